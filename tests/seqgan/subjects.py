"""The models of seqgan for `tests/test_model_contract.py`: tokenizers, transformers, discriminators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seqgan.models import (
    ARTransformer,
    MaskedTransformer,
    MaskGITEntropy,
    PatchDiscriminator,
    StyleDiscriminator,
    UsageEntropy,
    conv_tokenizer,
    vqgan_tokenizer,
)
from tests.contract import Subject, images

TRANSFORMER = dict(codebook_size=12, num_classes=3, length=16, dim=16, depth=2, num_heads=2)
# `make test` takes each graph through torch.export and a trace (ONNX by the legacy exporter); the dynamo exporter, ten
# times as dear as these, takes one model of every kind.
USUAL = ("export", "legacy")
REST = ("dynamo", "trace")
BOTH = ("dynamo", "legacy")
BARE = ("export", "trace")


def codes(*shape: int, size: int = 12) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randint(size, (batch, *shape)),)


def asked(batch: int, masked: bool = False) -> tuple[Tensor, ...]:
    mask = (torch.rand(batch, 16) < 0.5,) if masked else ()
    return (torch.randint(12, (batch, 16)), *mask, torch.randint(3, (batch,)))


def tokenizer(**options: object) -> Callable[[], nn.Module]:
    return lambda: conv_tokenizer(32, (1, 2), 1, codebook_size=16, z_dim=8, **options)


def second_phase() -> nn.Module:
    """Its new layers begin as the identity; here they count."""
    model = tokenizer(extra="attn1", entropy=UsageEntropy())()
    with torch.no_grad():
        for value in model.decoder.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def vqgan() -> nn.Module:
    return vqgan_tokenizer(32, (1, 2), 1, (16,), 32, 16, codebook_size=16, embed_dim=8)


def with_terms(model: nn.Module, out: Any) -> Tensor:
    """The reconstruction and what the quantizer asks of training."""
    return out.reconstruction.float().square().sum() + sum(out.losses.values())


SUBJECTS = {
    "tokenizer": Subject(
        tokenizer(entropy=UsageEntropy()), images(16, 16), loss=with_terms, ways=("compile", *USUAL), slow=REST
    ),
    "second_phase": Subject(
        second_phase, images(16, 16), loss=with_terms, ways=("compile", *BOTH), slow=BARE
    ),
    "encode": Subject(
        tokenizer(), images(16, 16), lambda model, image: model.encode(image), ways=USUAL, slow=REST, quick=False
    ),
    "decode": Subject(
        tokenizer(), codes(64, size=16), lambda model, indices: model.decode(indices), ways=USUAL, slow=REST,
        quick=False,
    ),
    "vqgan": Subject(vqgan, images(32, 32), loss=with_terms, ways=USUAL, slow=("compile", *REST)),
    "factorized": Subject(
        tokenizer(quantizer="l2norm_factorized"), images(16, 16), loss=with_terms, ways=USUAL, slow=REST
    ),
    "ema": Subject(tokenizer(quantizer="ema"), images(16, 16), loss=with_terms),
    "restart": Subject(
        tokenizer(quantizer="kmeans_restart", entropy=MaskGITEntropy()), images(16, 16), loss=with_terms
    ),
    "autoregressive": Subject(lambda: ARTransformer(**TRANSFORMER), asked, ways=("compile", *USUAL), slow=REST),
    "tokens": Subject(
        lambda: ARTransformer(**TRANSFORMER), codes(16), lambda model, tokens: model.token_logits(tokens),
        ways=("legacy",), slow=("dynamo", *BARE), quick=False,
    ),
    "masked": Subject(
        lambda: MaskedTransformer(**TRANSFORMER), lambda batch: asked(batch, True), ways=("compile", *BOTH), slow=BARE
    ),
    "patch_discriminator": Subject(
        lambda: PatchDiscriminator(ndf=8, n_layers=2), images(32, 32), ways=USUAL, slow=REST
    ),
    "style_discriminator": Subject(
        lambda: StyleDiscriminator(16, channels={4: 8, 8: 8, 16: 4}), images(16, 16), ways=USUAL, slow=REST
    ),
}  # fmt: skip
ELSEWHERE: tuple[str, ...] = ()
