"""Use of the codebook, and predictability of codes."""

from __future__ import annotations

import math

import pytest
import torch

from seqgan.metrics.diagnostics import code_histogram, codebook_usage, predicted_images, teacher_forced
from seqgan.models import ARTransformer, conv_tokenizer


def test_usage_of_even_and_of_collapsed_codes() -> None:
    even = codebook_usage(code_histogram(torch.arange(8).view(2, 2, 2), 8))
    assert even.usage.item() == 1 and even.perplexity.item() == pytest.approx(8)
    half = codebook_usage(code_histogram(torch.arange(8) % 4, 8))
    assert half.usage.item() == 0.5 and half.perplexity.item() == pytest.approx(4)
    one = codebook_usage(code_histogram(torch.full((9,), 3), 8))
    assert one.usage.item() == 0.125 and one.perplexity.item() == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one image"):
        codebook_usage(torch.zeros(8, dtype=torch.long))


def test_histograms_of_batches_add_up() -> None:
    codes = torch.randint(8, (6, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(code_histogram(codes[:2], 8) + code_histogram(codes[2:], 8), code_histogram(codes, 8))


def test_an_untrained_transformer_needs_all_bits() -> None:
    model = ARTransformer(16, 1, 9, 8, 1, 1).eval()
    model.head.weight.data.zero_()
    found = teacher_forced(model, torch.arange(9)[None])
    assert found.bits.item() == pytest.approx(4) and found.nll[0, 0].item() == pytest.approx(4 * math.log(2))
    assert found.accuracy.item() == pytest.approx(1 / 9)  # among equals the first code is named


def test_pictures_of_predicted_codes() -> None:
    torch.manual_seed(0)
    tokenizer = conv_tokenizer(32, (1, 2), 1, codebook_size=16, z_dim=8).eval()
    torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
    model = ARTransformer(16, 1, 16, 8, 1, 1).eval()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    true, predicted = predicted_images(tokenizer, model, image)
    assert torch.equal(true, tokenizer(image).reconstruction.clamp(-1, 1))
    assert predicted.shape == true.shape and not torch.equal(predicted, true)
    tokenizer.decoder.conv_out.weight.data *= 50  # far beyond white and black
    assert all(part.abs().max() == 1 for part in predicted_images(tokenizer, model, image))


def test_pictures_of_predicted_codes_know_the_class() -> None:
    torch.manual_seed(0)
    tokenizer = conv_tokenizer(32, (1, 2), 1, codebook_size=16, z_dim=8).eval()
    model = ARTransformer(16, 2, 16, 8, 1, 1).eval()
    for weight in (tokenizer.quantizer.embedding.weight, model.tokens.weight, model.head.weight):
        torch.nn.init.normal_(weight)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    label = torch.tensor([0, 1])
    codes = teacher_forced(model, tokenizer.encode(image).flatten(1), label).predicted
    _, predicted = predicted_images(tokenizer, model, image, label)
    assert torch.equal(predicted, tokenizer.decode(codes.view(2, 4, 4)).clamp(-1, 1))
    assert not torch.equal(predicted, predicted_images(tokenizer, model, image, 1 - label)[1])
