"""Random walks between parts (patch features) and whole (slots), and what is read off them (section 3 of the paper).

Everything here is computed in float32, also under autocast: a softmax at temperature 0.1 magnifies rounding tenfold.
Inputs in float64 stay float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core.layers.precision import full_precision, no_autocast

#: Division guard of the norms.
NORM_EPS = 1e-12


def transitions(features: Tensor, slots: Tensor, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """Where a walker goes from each part, and from each slot: softmaxes of the cosine similarity over temperature.

    Args:
        features: of the parts, `(B, N, C)`.
        slots: in the same space, `(B, K, C)`.
        temperature: of both softmaxes; smaller is sharper.

    Returns:
        `P` `(B, N, K)`, rows over slots (part to whole), and `Q` `(B, K, N)`, rows over parts (whole to part).

    Raises:
        ValueError: features and slots have different numbers of channels.
    """
    with no_autocast(features):
        return transitions_between(unit(features), unit(slots), temperature)


def unit(vectors: Tensor) -> Tensor:
    """The vectors at length one, in at least float32."""
    return F.normalize(full_precision(vectors), dim=-1, eps=NORM_EPS)


def transitions_between(parts: Tensor, whole: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`transitions` of what is of unit length already.

    Raises:
        ValueError: parts and slots have different numbers of channels.
    """
    if parts.shape[-1] != whole.shape[-1]:
        raise ValueError(
            f"slots of {whole.shape[-1]} channels cannot be compared with features of {parts.shape[-1]}: make the "
            "slots as wide as the features, or project them (slot_to_feature='linear')"
        )
    similarity = parts @ whole.transpose(1, 2) / temperature
    return similarity.softmax(dim=2), similarity.transpose(1, 2).softmax(dim=2)


def masks(assignment: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Soft masks at picture size: the assignment of parts, interpolated bilinearly.

    Args:
        assignment: parts to slots `(B, N, K)`, N = h*w in row-major order.
        grid: `(h, w)`.
        size: `(H, W)` of the masks.

    Returns:
        `(B, K, 1, H, W)`; they sum to one over the slots when the assignment does.
    """
    maps = rearrange(full_precision(assignment), "b (h w) k -> b k h w", h=grid[0], w=grid[1])
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False).unsqueeze(2)


def segments(assignment: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The slot of every pixel: argmax of `masks`, `(B, H, W)` uint8 (int64 for more than 256 slots)."""
    winner = masks(assignment, grid, size).squeeze(2).argmax(dim=1)
    return winner.to(torch.uint8) if assignment.shape[-1] <= 256 else winner


def region_vectors(to_part: Tensor, features: Tensor) -> Tensor:
    """One vector per slot for clustering: mean of the normalised features, weighted by the walk from the slot.

    Args:
        to_part: Q, `(B, K, N)`.
        features: `(B, N, C)`.

    Returns:
        `(B, K, C)`.
    """
    with no_autocast(features):
        return full_precision(to_part) @ unit(features)
