"""Every model leaves Python right: `torch.export`, ONNX by both exporters, `torch.jit.trace`, at another batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqgan.models import (
    ARTransformer,
    MaskedTransformer,
    PatchDiscriminator,
    StyleDiscriminator,
    UsageEntropy,
    conv_tokenizer,
    vqgan_tokenizer,
)
from tests.exported import WAYS, check

TRANSFORMER = dict(codebook_size=12, num_classes=3, length=16, dim=16, depth=2, num_heads=2)


def images(side: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.rand(batch, 3, side, side) * 2 - 1,)


def codes(*shape: int, size: int = 12) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randint(size, (batch, *shape)),)


def asked(batch: int, masked: bool = False) -> tuple[Tensor, ...]:
    mask = (torch.rand(batch, 16) < 0.5,) if masked else ()
    return (torch.randint(12, (batch, 16)), *mask, torch.randint(3, (batch,)))


def tokenizer(**options: object) -> Callable[[], nn.Module]:
    return lambda: conv_tokenizer(32, (1, 2), 1, codebook_size=16, z_dim=8, **options)


def vqgan() -> nn.Module:
    return vqgan_tokenizer(32, (1, 2), 1, (16,), 32, 16, codebook_size=16, embed_dim=8)


MODELS: dict[str, tuple[Any, ...]] = {
    "tokenizer": (tokenizer(entropy=UsageEntropy()), images(16)),
    "second_phase": (tokenizer(extra="attn1"), images(16)),
    "encode": (tokenizer(), images(16), lambda model, image: model.encode(image)),
    "decode": (tokenizer(), codes(64, size=16), lambda model, indices: model.decode(indices)),
    "vqgan": (vqgan, images(32)),
    "factorized": (tokenizer(quantizer="l2norm_factorized"), images(16)),
    "autoregressive": (lambda: ARTransformer(**TRANSFORMER), asked),
    "tokens": (lambda: ARTransformer(**TRANSFORMER), codes(16), lambda model, tokens: model.token_logits(tokens)),
    "masked": (lambda: MaskedTransformer(**TRANSFORMER), lambda batch: asked(batch, True)),
    "patch_discriminator": (lambda: PatchDiscriminator(ndf=8, n_layers=2), images(32)),
    "style_discriminator": (lambda: StyleDiscriminator(16, channels={4: 8, 8: 8, 16: 4}), images(16)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_models_leave_python_as_they_are(name: str, way: str, tmp_path) -> None:
    build, inputs, *call = MODELS[name]
    torch.manual_seed(0)
    check(way, build().eval(), inputs, tmp_path, call=call[0] if call else None)
