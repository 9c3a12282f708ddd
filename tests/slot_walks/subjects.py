"""The models of slot_walks for `tests/test_model_contract.py`: backbones, slots, every decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slot_walks.models import DinoViT, FilterBank, SlotEncoder, SlotWalker, TimmBackbone
from tests.contract import Subject, images

VIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
SLOTS = dict(in_dim=16, dim=16, num_slots=3)
# `make test` takes each graph through torch.export and a trace (ONNX by the legacy exporter); the dynamo exporter, ten
# times as dear as these, takes one model of every kind.
USUAL = ("export", "legacy")
REST = ("dynamo", "trace")
BOTH = ("dynamo", "legacy")
BARE = ("export", "trace")


def with_noise(*hw: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.rand(batch, 3, *hw), torch.randn(batch, 3, 16))


def noisy(model: nn.Module, image: Tensor, noise: Tensor) -> Any:
    return model(image, noise=noise)


def walker(signal: str = "walk", **options: object) -> Callable[[], nn.Module]:
    decoder = {} if signal == "walk" else dict(decoder_width=16, decoder_depth=1)
    if signal == "transformer":
        decoder["decoder_heads"] = 2
    return lambda: SlotWalker(DinoViT(**VIT), SlotEncoder(**SLOTS | options), signal=signal, feature_grid=4, **decoder)


SUBJECTS = {
    "dino": Subject(  # without its last norm, and as a key without what follows the keys of the last block
        lambda: DinoViT(**VIT), images(32, 32), ways=USUAL, slow=("compile", *REST), idle=("norm.",)
    ),
    "dino_other_size": Subject(
        lambda: DinoViT(**VIT, final_norm=True), images(40, 56), ways=BARE, slow=BOTH, quick=False
    ),
    "dino_key": Subject(
        lambda: DinoViT(**VIT, facet="key"), images(40, 56), ways=("legacy",), slow=("dynamo", *BARE),
        idle=("norm.", "blocks.1.attn.proj.", "blocks.1.norm2.", "blocks.1.mlp."),
    ),
    "filterbank": Subject(FilterBank, images(32, 40), ways=USUAL, slow=REST, trained=False),
    "timm": Subject(
        lambda: TimmBackbone("vit_tiny_patch16_224", layer=1), images(224, 224), ways=USUAL, slow=REST, quick=False,
    ),
    "encoder": Subject(
        lambda: SlotEncoder(**SLOTS), lambda b: (torch.randn(b, 20, 16), torch.randn(b, 3, 16)), ways=USUAL, slow=REST
    ),
    "walker": Subject(walker(), with_noise(40, 56), noisy, ways=("compile", *USUAL), slow=REST),
    "walker_mlp": Subject(walker("walk+mlp"), with_noise(40, 56), noisy, ways=("compile", *BOTH), slow=BARE),
    "mlp": Subject(walker("mlp"), with_noise(40, 56), noisy, slow=("compile",)),
    "walker_broadcast": Subject(walker("broadcast"), with_noise(40, 56), noisy, ways=("compile", *USUAL), slow=REST),
    "walker_transformer": Subject(
        walker("transformer", init="learned", num_heads=2), images(40, 56), ways=("compile", *USUAL), slow=REST
    ),
}  # fmt: skip
# It draws what it hides, and only a backbone's training uses it: test_slot_walks_pretraining.py.
ELSEWHERE: tuple[str, ...] = ("MaskedAutoencoder",)
