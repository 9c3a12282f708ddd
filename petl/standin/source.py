"""The stand-in's backbone, a small ViT, and its pre-training on the source of `petl.standin.cue_swap`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.trainer import Batch, Trainer
from petl.standin.cue_swap import FACTORS
from petl.trainer.network import load_backbone

STEM = (116, 6, 6)  # channels that the stem gives to brightness, first and second colour


def cue_backbone(
    source: str | Path | None = None,
    dim: int = 128,
    depth: int = 3,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
    num_classes: int = 0,
) -> nn.Module:
    """A ViT of timm for images of 32 x 32 in patches of 8: 424,704 parameters by default.

    Args:
        source: file of pre-trained weights; None: untrained.
        dim, depth, num_heads, mlp_ratio, num_classes: of the network.

    Raises:
        ConfigError: no such file, or it does not fit.
    """
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        num_classes=num_classes,
    )
    if source is not None:
        if not Path(source).is_file() and not network.pos_embed.is_meta:
            raise ConfigError(
                f"there is no pre-trained network {source}: python tools/prepare_data.py paper=petl task=cue_source "
                "seeds=SEED trains one of that seed"
            )
        load_backbone(network, source)
    return network


class SourceTrainer(Trainer):
    """Pre-training: cross-entropies of every factor, from one linear head.

    Colours enter the stem by a few channels of their own, and it stays so: other weights of the stem are zero and get
    no gradient.

    Args:
        network: from `cue_backbone`, with ``sum(FACTORS.values())`` outputs.
        stem: channels of the stem that read brightness, first and second colour; None: all read all.
        input_shape: of an image.
        frozen: see `core.Trainer`.

    Raises:
        ConfigError: `stem` does not add up to the network's width.
    """

    def __init__(
        self,
        network: nn.Module,
        stem: Sequence[int] | None = STEM,
        input_shape: Sequence[int] = (3, 32, 32),
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        self.network, self.input_shape = network, tuple(input_shape)
        if stem is not None:
            split_stem(network, stem)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """One `loss_FACTOR` and one `accuracy_FACTOR` each."""
        found: dict[str, Tensor] = {}
        for (name, _), logits, label in self._parts(batch):
            found[f"loss_{name}"] = nn.functional.cross_entropy(logits.float(), label)
            found[f"accuracy_{name}"] = (logits.detach().argmax(1) == label).float().mean()
        return found

    def predict(self, batch: Batch) -> dict[str, Any]:
        """`logits` `(B, 9)` of the place and `label`; of every factor `FACTOR_logits` and the truth, `FACTOR`."""
        found: dict[str, Any] = {}
        for (name, _), logits, label in self._parts(batch):
            found.update({f"{name}_logits": logits, name: label})
        return {**found, "logits": found["place_logits"], "label": batch["label"], "sample_id": batch["sample_id"]}

    def _parts(self, batch: Batch) -> Any:
        logits = self.network(batch["image"]).split(list(FACTORS.values()), dim=1)
        return zip(FACTORS.items(), logits, batch["factors"].unbind(1), strict=True)


def split_stem(network: nn.Module, stem: Sequence[int]) -> None:
    """Lets each channel of the patch embedding read one plane of the image, now and in training.

    Raises:
        ConfigError: `stem` does not add up to the network's width.
    """
    weight = network.patch_embed.proj.weight  # (C, 3, 8, 8)
    if sum(stem) != len(weight) or len(stem) != weight.shape[1]:
        raise ConfigError(f"stem={list(stem)} has to be {weight.shape[1]} numbers that add up to {len(weight)}")
    kept = torch.zeros(len(weight), len(stem), 1, 1, device="cpu")
    first = 0
    for plane, channels in enumerate(stem):
        kept[first : first + channels, plane] = 1.0
        first += channels
    kept = kept.to(weight)
    with torch.no_grad():
        # As large as if every channel read all planes.
        weight.mul_(kept * len(stem) ** 0.5)
    weight.register_hook(lambda gradient: gradient * kept)
