"""Whether slots bind: how evenly they are used, how many are in use, how large they are, and whether features suit.

What users of slot models meet most often is slots that spread over everything, or a few that take all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core.layers.precision import full_precision
from slot_walks.losses.walks import unit


def slot_usage(assignment: Tensor) -> Tensor:
    """Share of the picture that each slot takes, `(B, K)`, of parts over slots `(B, N, K)`; it sums to one."""
    return full_precision(assignment).mean(dim=1)


def usage_entropy(assignment: Tensor) -> Tensor:
    """Entropy of a picture's slot usage over that of even usage, `(B,)`: 0 when one slot takes all, 1 when all share.

    With a single slot it is 0.
    """
    usage = slot_usage(assignment)
    return torch.special.entr(usage).sum(dim=1) / math.log(max(usage.shape[1], 2))


def effective_slots(assignment: Tensor) -> Tensor:
    """How many slots a picture uses, `(B,)` from 1 to K: exponential of the entropy of the usage."""
    return torch.special.entr(slot_usage(assignment)).sum(dim=1).exp()


def area_histogram(assignment: Tensor, bins: int = 10) -> Tensor:
    """How many slots of a batch have an area in each of `bins` equal parts of [0, 1], `(bins,)` int64.

    A slot's area is the share of the parts that it takes when every part goes to its strongest slot.
    """
    slots = assignment.shape[2]
    areas = F.one_hot(assignment.argmax(dim=2), slots).float().mean(dim=1)
    places = (areas * bins).long().clamp(max=bins - 1)
    return torch.bincount(places.flatten(), minlength=bins)


def token_labels(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The most frequent label of each patch, `(B, N)` int64, of a label map `(B, H, W)`; of equals the smallest.

    Raises:
        ValueError: the grid does not divide the map.
    """
    height, width = mask.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"a label map of {height} x {width} cannot be cut into {grid[0]} x {grid[1]} equal patches")
    patches = rearrange(mask.long(), "b (h p) (w q) -> b (h w) (p q)", h=grid[0], w=grid[1])
    labels, compact = torch.unique(patches, return_inverse=True)
    counts = torch.zeros(*patches.shape[:2], len(labels), device=mask.device)
    counts.scatter_add_(2, compact, torch.ones_like(compact, dtype=counts.dtype))
    return labels[counts.argmax(dim=2)]


def pair_shares(features: Tensor, labels: Tensor, threshold: float = 0.7) -> tuple[Tensor, Tensor]:
    """Which pairs of parts the P-W-P target joins: the data check that tells whether its threshold suits the features.

    Args:
        features: `(B, N, C)`.
        labels: of the parts `(B, N)` (`token_labels`); the background counts as one more object.
        threshold: cosine similarity from which on two parts belong together.

    Returns:
        Share of the pairs of one object, and of two, that reach the threshold, `(B,)` each; a part is no pair with
        itself, and a share of no pairs is 0.
    """
    shares = []
    for parts, label in zip(unit(features), labels, strict=True):  # one N x N at a time
        joined = parts @ parts.T >= threshold
        same = label[:, None] == label
        pairs = torch.stack([same.fill_diagonal_(False), label[:, None] != label])
        shares.append((joined & pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1))
    within, between = torch.stack(shares, dim=1)
    return within, between


def affinity_gap(features: Tensor, labels: Tensor, threshold: float = 0.7) -> Tensor:
    """Share of joined pairs within objects less that between objects, `(B,)`: 1 is a perfect target, 0 useless."""
    within, between = pair_shares(features, labels, threshold)
    return within - between
