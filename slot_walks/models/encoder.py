"""From patch features to slots: projection, start, slot attention. All that the paper trains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from slot_walks.models.slot_attention import SlotAttention
from slot_walks.models.slot_init import SlotInit

PROJECTIONS = ("slot", "feature")


class SlotOutput(NamedTuple):
    """What the encoder gives.

    slots: `(B, K, D)`.
    attention: `(B, K, N)`, rows sum to one over the tokens.
    assignment: `(B, N, K)`, rows sum to one over the slots.
    init: the slots' start `(B, K, D)`.
    """

    slots: Tensor
    attention: Tensor
    assignment: Tensor
    init: Tensor


class SlotEncoder(nn.Module):
    """Slots of patch features.

    Args:
        in_dim: channels C of a feature.
        dim: channels D of a slot.
        num_slots: K; any other K can be asked for at each call.
        hidden: width of the MLPs; None: D.
        projection_hidden: width of the projection's hidden layer; None: as `hidden`.
        init: start of the slots: gaussian, learned or gaussian_mean (see `SlotInit`).
        num_iterations: of slot attention.
        num_heads: of slot attention.
        truncate: see `SlotAttention`; with `fixed_point` no gradient reaches the start, which is therefore frozen.
        projection: `slot`: LayerNorm, C to hidden to D, as released; `feature`: LayerNorm, C to C to C, and keys and
            values read C (BO-QSA, SPOT).
        eps: see `SlotAttention`.

    Raises:
        ValueError: an unknown choice.
    """

    def __init__(
        self,
        in_dim: int = 384,
        dim: int = 384,
        num_slots: int = 7,
        hidden: int | None = None,
        init: str = "gaussian",
        num_iterations: int = 3,
        num_heads: int = 1,
        truncate: str = "none",
        projection: str = "slot",
        eps: float = 1e-8,
        projection_hidden: int | None = None,
    ) -> None:
        super().__init__()
        if projection not in PROJECTIONS:
            raise ValueError(f"unknown projection {projection!r}: use {', '.join(PROJECTIONS)}")
        hidden = dim if hidden is None else hidden
        self.in_dim, self.dim = in_dim, dim
        width, out = (hidden, dim) if projection == "slot" else (in_dim, in_dim)
        width = width if projection_hidden is None else projection_hidden
        self.project = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, width), nn.ReLU(), nn.Linear(width, out))
        for layer in (self.project[1], self.project[3]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.init = SlotInit(num_slots, dim, init)
        self.attention = SlotAttention(dim, out, num_iterations, num_heads, hidden, truncate, eps)
        if truncate == "fixed_point":
            self.init.requires_grad_(False)

    @property
    def num_slots(self) -> int:
        """K of the constructor."""
        return self.init.num_slots

    def forward(
        self, features: Tensor, noise: Tensor | torch.Generator | None = None, num_slots: int | None = None
    ) -> SlotOutput:
        """Slots of features `(B, N, C)`; `noise` and `num_slots` as in `SlotInit`.

        Raises:
            ValueError: features of another width.
        """
        if features.shape[-1] != self.in_dim:
            raise ValueError(
                f"features have {features.shape[-1]} channels, the slot encoder was built for {self.in_dim} (in_dim)"
            )
        start = self.init(features.shape[0], num_slots, noise)
        return SlotOutput(*self.attention(self.project(features), start), start)
