"""Every model leaves Python right: `torch.export`, ONNX by both exporters, `torch.jit.trace`, at another batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slot_walks.models import DinoViT, FilterBank, SlotEncoder, SlotWalker, TimmBackbone
from tests.exported import WAYS, check

VIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
SLOTS = dict(in_dim=16, dim=16, num_slots=3)


def images(*hw: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.rand(batch, 3, *hw),)


def with_noise(*hw: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.rand(batch, 3, *hw), torch.randn(batch, 3, 16))


def noisy(model: nn.Module, image: Tensor, noise: Tensor) -> Any:
    return model(image, noise=noise)


def walker(signal: str = "walk", **options: object) -> Callable[[], nn.Module]:
    decoder = dict(decoder_width=16, decoder_depth=1, decoder_heads=2) if signal == "transformer" else {}
    return lambda: SlotWalker(DinoViT(**VIT), SlotEncoder(**SLOTS | options), signal=signal, feature_grid=4, **decoder)


MODELS: dict[str, tuple[Any, ...]] = {
    "dino": (lambda: DinoViT(**VIT), images(32, 32)),
    "dino_other_size": (lambda: DinoViT(**VIT, final_norm=True), images(40, 56)),
    "filterbank": (FilterBank, images(32, 40)),
    "timm": (lambda: TimmBackbone("vit_tiny_patch16_224", layer=1), images(224, 224)),
    "encoder": (lambda: SlotEncoder(**SLOTS), lambda b: (torch.randn(b, 20, 16), torch.randn(b, 3, 16))),
    "walker": (walker(), with_noise(40, 56), noisy),
    "walker_mlp": (walker("walk+mlp"), with_noise(40, 56), noisy),
    "walker_broadcast": (walker("broadcast"), with_noise(40, 56), noisy),
    "walker_transformer": (walker("transformer", init="learned", num_heads=2), images(40, 56)),
    "dino_key": (lambda: DinoViT(**VIT, facet="key"), images(40, 56)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_models_leave_python_as_they_are(name: str, way: str, tmp_path) -> None:
    build, inputs, *call = MODELS[name]
    torch.manual_seed(0)
    check(way, build().eval(), inputs, tmp_path, call=call[0] if call else None)
