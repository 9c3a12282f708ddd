"""What a walk from part to whole and back may end at: the target of the P-W-P walk (section 3 of the paper).

A target is a row-stochastic matrix S over parts. It is made in blocks of rows, so that no more of it exists than is in
use, and never carries gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slot_walks.losses.walks import unit
from slot_walks.models.positions import remembered, unit_positions

KINDS = ("thresholded", "identity", "dense", "topk", "attention")
POSITIONS = ("none", "average", "product")

#: Similarity given to pairs that do not belong together; over the temperature it is far below any other.
_APART = -1e4


@torch.no_grad()
def target_rows(
    parts: Tensor,
    start: int,
    stop: int,
    kind: str = "thresholded",
    threshold: float = 0.7,
    temperature: float = 0.1,
    ratio: float = 0.5,
    position: str = "none",
    places: Tensor | None = None,
    assignment: Tensor | None = None,
    attention: Tensor | None = None,
) -> Tensor:
    """Rows `start` to `stop` of S, `(B, stop - start, N)`, each of which sums to one.

    Args:
        parts: features as unit vectors `(B, N, C)`.
        start: first row.
        stop: row after the last.
        kind: `thresholded`: softmax over cosine similarity, of pairs whose similarity reaches `threshold`; `dense`: of
            all pairs; `topk`: of each row's largest; `identity`: the part itself; `attention`: two steps along the slot
            attention, part to slot by `assignment` and back by `attention`.
        threshold: see `kind`.
        temperature: of the softmaxes, that over places included.
        ratio: `topk`: the share of all parts that a row keeps.
        position: `none`; `average` with the affinity of places; `product` with it, rows normalised again.
        places: unit vectors of the places `(N, C)`; for a `position`.
        assignment: parts over slots `(B, N, K)`; for `attention`.
        attention: slots over parts `(B, K, N)`; for `attention`.

    Raises:
        ValueError: unknown kind or position.
    """
    rows = _rows(parts, start, stop, kind, threshold, temperature, ratio, assignment, attention)
    if position == "none":
        return rows
    near = (places[start:stop] @ places.T / temperature).softmax(dim=1)
    if position == "average":
        return rows.add_(near).mul_(0.5)
    if position == "product":
        rows = rows.mul_(near)
        return rows.div_(rows.sum(dim=2, keepdim=True))
    raise ValueError(f"unknown target_position {position!r}: use {', '.join(POSITIONS)}")


def _rows(
    parts: Tensor,
    start: int,
    stop: int,
    kind: str,
    threshold: float,
    temperature: float,
    ratio: float,
    assignment: Tensor | None,
    attention: Tensor | None,
) -> Tensor:
    batch, count = parts.shape[:2]
    if kind == "identity":
        rows = torch.zeros(stop - start, count, device=parts.device, dtype=parts.dtype)
        rows.diagonal(start).fill_(1)
        return rows.repeat(batch, 1, 1)
    if kind == "attention":
        return assignment[:, start:stop].to(parts.dtype) @ attention.to(parts.dtype)
    similarity = parts[:, start:stop] @ parts.transpose(1, 2)
    if kind == "thresholded":
        similarity.masked_fill_(similarity < threshold, _APART)
    elif kind == "topk":
        values, places = similarity.topk(max(1, int(ratio * count)), dim=2)
        similarity = torch.full_like(similarity, _APART).scatter_(2, places, values)
    elif kind != "dense":
        raise ValueError(f"unknown target {kind!r}: use {', '.join(KINDS)}")
    return similarity.div_(temperature).softmax(dim=2)


def affinity_target(
    features: Tensor,
    temperature: float = 0.1,
    threshold: float = 0.7,
    grid: tuple[int, int] | None = None,
    position: str = "none",
) -> Tensor:
    """The whole thresholded target S, `(B, N, N)`, for looking at it.

    Args:
        features: `(B, N, C)`.
        temperature: of the softmaxes.
        threshold: pairs below it do not belong together.
        grid: `(h, w)`; for a `position`.
        position: see `target_rows`.
    """
    parts = unit(features.detach())
    places = None if position == "none" else unit_places(parts, grid)
    return target_rows(
        parts, 0, parts.shape[1], threshold=threshold, temperature=temperature, position=position, places=places
    )


def unit_places(parts: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Unit vectors of the places of a grid, as wide as the parts `(B, N, C)`: `(N, C)`.

    Raises:
        ValueError: no grid, or one of another number of parts.
    """
    if grid is None or grid[0] * grid[1] != parts.shape[1]:
        raise ValueError(f"a target with positions needs the grid of the {parts.shape[1]} parts, not {grid}")
    return remembered(unit_positions, parts, parts.shape[2], *grid).to(parts.dtype)
