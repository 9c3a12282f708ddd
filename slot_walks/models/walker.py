"""The whole model: frozen backbone, slot encoder, and the decoder where the training signal is a reconstruction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.layers.recorded import fixed
from slot_walks.models.decoders import KINDS, build_decoder
from slot_walks.models.encoder import SlotEncoder

SIGNALS = ("walk", *KINDS)


class WalkerOutput(NamedTuple):
    """What the model gives.

    features: of the parts `(B, N, C)`, without gradient.
    grid: `(h, w)` of the parts, N = h*w.
    slots: `(B, K, D)`.
    whole: slots in the features' space `(B, K, C)`; None where neither is as wide as the other nor projected.
    attention: slots over parts in the slot attention `(B, K, N)`.
    assignment: parts over slots there `(B, N, K)`.
    reconstruction: of the features by the decoder `(B, N, C)`; None without one.
    decoder_masks: its masks `(B, K, N)`; None without one.
    """

    features: Tensor
    grid: tuple[int, int]
    slots: Tensor
    whole: Tensor | None
    attention: Tensor
    assignment: Tensor
    reconstruction: Tensor | None
    decoder_masks: Tensor | None


class SlotWalker(nn.Module):
    """Slots of pictures (SACRW, section 3 of the paper), with the training signal as one argument.

    The backbone is frozen: no gradients, and evaluation mode whatever happens.

    Args:
        backbone: from pictures to features, with `dim` and `grid(image)` (`DinoViT`, `TimmBackbone`, `FilterBank`);
            None: features come from a cache.
        encoder: from features to slots.
        signal: `walk`: no decoder; `mlp`, `broadcast` or `transformer`: a decoder reconstructs the features; two joined
            by a plus sign (`walk+mlp`): both.
        slot_to_feature: `identity`: slots are compared with features as they are, so they must be as wide; `linear`:
            through a learned map.
        feature_grid: `(h, w)` of the features in training, or one number for a square; decoders learn positions on it.
        decoder_width: see `build_decoder`.
        decoder_depth: see `build_decoder`.
        decoder_heads: see `build_decoder`.

    Raises:
        ValueError: an unknown signal, or widths that do not fit.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        encoder: SlotEncoder,
        signal: str = "walk",
        slot_to_feature: str = "identity",
        feature_grid: int | tuple[int, int] = 28,
        decoder_width: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.signals = signals_of(signal)
        self.signal = signal
        self.feature_grid = (feature_grid, feature_grid) if isinstance(feature_grid, int) else tuple(feature_grid)
        if backbone is not None and backbone.dim != encoder.in_dim:
            raise ValueError(
                f"the backbone gives {backbone.dim} channels, the slot encoder takes {encoder.in_dim}: set the "
                f"encoder's in_dim={backbone.dim}"
            )
        if slot_to_feature not in ("identity", "linear"):
            raise ValueError(f"unknown slot_to_feature {slot_to_feature!r}: use identity or linear")
        if "walk" in self.signals and slot_to_feature == "identity" and encoder.dim != encoder.in_dim:
            raise ValueError(
                f"walks compare slots of {encoder.dim} channels with features of {encoder.in_dim}: give slots that "
                "width or set slot_to_feature=linear"
            )
        self.backbone = None if backbone is None else backbone.requires_grad_(False).eval()
        self.encoder = encoder
        self.to_feature = nn.Linear(encoder.dim, encoder.in_dim) if slot_to_feature == "linear" else None
        decoder = next((kind for kind in self.signals if kind != "walk"), None)
        self.decoder = None
        if decoder is not None:
            self.decoder = build_decoder(
                decoder, encoder.dim, encoder.in_dim, self.feature_grid, decoder_width, decoder_depth, decoder_heads
            )

    def train(self, mode: bool = True) -> SlotWalker:
        """Training mode, except for the backbone."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def features(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features `(B, N, C)` of pictures `(B, 3, H, W)`, and their grid.

        Raises:
            ValueError: there is no backbone.
        """
        if self.backbone is None:
            raise ValueError("this model has no backbone: give it cached features, or build it with one")
        with torch.no_grad():
            return self.backbone(image), self.backbone.grid(image)

    def forward(
        self,
        image: Tensor | None = None,
        *,
        features: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        noise: Tensor | torch.Generator | None = None,
        num_slots: int | None = None,
        decode: bool = True,
    ) -> WalkerOutput:
        """Slots of pictures, or of their features.

        Args:
            image: `(B, 3, H, W)`, any size and shape; not needed with `features`.
            features: of a cache, `(B, N, C)` or `(B, h, w, C)`; half precision is made float32.
            grid: `(h, w)` of features `(B, N, C)`; None: a square.
            noise: see `SlotInit`.
            num_slots: K, if not the encoder's.
            decode: whether the decoder runs, where there is one.

        Raises:
            ValueError: neither pictures nor features, or features of no grid.
        """
        if features is None:
            if image is None:
                raise ValueError("give pictures or features")
            features, grid = self.features(image)
        else:
            features, grid = _flat(features, grid)
        encoded = self.encoder(features, noise, num_slots)
        same = encoded.slots if self.encoder.dim == self.encoder.in_dim else None
        whole = same if self.to_feature is None else self.to_feature(encoded.slots)
        reconstruction = masks = None
        if self.decoder is not None and decode:
            reconstruction, masks = self.decoder(encoded.slots, grid, features)
        return WalkerOutput(
            features, grid, encoded.slots, whole, encoded.attention, encoded.assignment, reconstruction, masks
        )


def signals_of(signal: str) -> tuple[str, ...]:
    """The parts of a training signal's name.

    Raises:
        ValueError: an unknown part, none, or two decoders.
    """
    parts = tuple(signal.split("+"))
    unknown = [part for part in parts if part not in SIGNALS]
    if unknown or len(set(parts)) != len(parts) or sum(part != "walk" for part in parts) > 1:
        raise ValueError(
            f"signal {signal!r}: use walk, {', '.join(KINDS)}, or walk and one of the others joined by a plus sign"
        )
    return parts


def _flat(features: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    """Features as `(B, N, C)` in float32 (or what the caller computes in), with their grid."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    if features.ndim == 4:
        return features.flatten(1, 2), fixed(features, 1, 2)
    (count,) = fixed(features, 1)
    if grid is None:
        grid = (math.isqrt(count),) * 2
    if grid[0] * grid[1] != count:
        raise ValueError(f"{count} features do not fill a grid of {grid[0]} x {grid[1]}: give their grid")
    return features, (int(grid[0]), int(grid[1]))
