"""Positions: a learned table on another grid; fixed sine tables, and the affinity of places that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# What DINO adds to the grid before it divides by the table's side, against rounding down. The factor also moves the
# sampling points, so `interpolate(size=...)` gives other numbers.
_NUDGE = 0.1


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINO's learned positions on a grid of another size, bicubically.

    Args:
        table: `(1, 1 + S*S, C)`, the class token's row first.
        grid: `(h, w)` of patches.

    Returns:
        `(1, 1 + h*w, C)`; the table itself on its own square grid.

    Raises:
        ValueError: the table does not belong to a square.
    """
    cells = table.shape[1] - 1
    side = round(cells**0.5)
    if side * side != cells:
        raise ValueError(
            f"a position table with {cells} places (and one for the class token) belongs to no square grid"
        )
    if grid == (side, side):
        return table
    maps = rearrange(table[:, 1:], "1 (h w) c -> 1 c h w", h=side)
    factors = tuple((length + _NUDGE) / side for length in grid)
    maps = F.interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rearrange(maps, "1 c h w -> 1 (h w) c")], dim=1)


def position_table(dim: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """2-D sine table `(dim, height, width)`.

    The first half of the channels encodes the column, the second the row; sine and cosine alternate, with frequencies
    `10000 ** (-2 i / (dim / 2))`.

    Raises:
        ValueError: `dim` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"a position table needs a number of channels divisible by 4, not {dim}")
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)

    def waves(length: int) -> Tensor:
        angle = frequency[:, None] * torch.arange(length, device=device, dtype=torch.float32)
        return rearrange(torch.stack([angle.sin(), angle.cos()], dim=1), "f two n -> (f two) n")

    column = waves(width)[:, None, :].expand(half, height, width)
    row = waves(height)[:, :, None].expand(half, height, width)
    return torch.cat([column, row])


def unit_positions(dim: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The table's columns as unit vectors, `(h*w, dim)` in row-major order."""
    return F.normalize(rearrange(position_table(dim, height, width, device), "c h w -> (h w) c"), dim=-1)


def position_affinity(
    dim: int, grid: tuple[int, int], temperature: float, device: torch.device | None = None
) -> Tensor:
    """How near places are: rows of a softmax over cosine similarity of the sine table, `(N, N)` (MOVi's target)."""
    places = unit_positions(dim, *grid, device)
    return (places @ places.T / temperature).softmax(dim=1)


def remembered(build: Callable[..., Tensor], like: Tensor, *sizes: Any) -> Tensor:
    """`build(*sizes, device)` on the device of `like`, made once per size and device.

    While a graph is traced nothing is remembered, so that tables become part of the graph.
    """
    if torch.compiler.is_compiling() or like.device.type == "meta":
        return build(*sizes, device=like.device)
    return _remembered(build, sizes, like.device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=32)
def _remembered(build: Callable[..., Tensor], sizes: tuple[Any, ...], device: torch.device, inference: bool) -> Tensor:
    return build(*sizes, device=device)
