"""Windows on token rasters: splitting, joining, and attention of query windows on larger key windows.

The dense form of STViT-R lets the semantic tokens of one 7x7 window attend the image tokens of a larger window around
it, and image tokens attend the semantic tokens of a neighbourhood. Every token is projected to keys and values once;
windows are cut from the projections (normalisation and projection act per token, so the result is the same and the
cost no longer grows with the overlap of the windows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from stvit.models.attention import Attention


def split_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Cut raster tokens `(B, H*W, C)` into square windows: `(B*windows, window*window, C)`, windows in raster order.

    Raises:
        ValueError: the windows do not tile the grid.
    """
    _check_tiling(grid, window)
    height, width = grid
    return rearrange(
        x,
        "b (nh wh nw ww) c -> (b nh nw) (wh ww) c",
        nh=height // window,
        nw=width // window,
        wh=window,
        ww=window,
    )


def merge_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Inverse of `split_windows`: `(B*windows, window*window, C)` back to raster tokens `(B, H*W, C)`."""
    _check_tiling(grid, window)
    height, width = grid
    return rearrange(
        x,
        "(b nh nw) (wh ww) c -> b (nh wh nw ww) c",
        nh=height // window,
        nw=width // window,
        wh=window,
        ww=window,
    )


def _check_tiling(grid: tuple[int, int], window: int) -> None:
    if grid[0] % window or grid[1] % window:
        raise ValueError(
            f"a {grid[0]}x{grid[1]} token grid cannot be cut into {window}x{window} windows: pad it to a multiple"
        )


def padded_size(size: int, window: int) -> int:
    """Smallest multiple of `window` that is not below `size`."""
    return -(-size // window) * window


def valid_cells(size: int, window: int, cells: int) -> int:
    """How many pooling cells along one axis contain at least one real position.

    An axis of `size` positions is padded at its end to whole windows and every window is pooled to `cells` adaptive
    cells (cell i of a window starts at `i*window//cells`). Cells that start behind the last real position hold padding
    alone; they are always the last ones.
    """
    windows = padded_size(size, window) // window
    in_last = size - (windows - 1) * window
    return (windows - 1) * cells + sum(i * window // cells < in_last for i in range(cells))


@dataclass(frozen=True)
class KeyWindows:
    """Which keys each query window sees: along either axis window i sees `[i*stride - before, ... + size)`.

    Attributes:
        queries: side of a query window in query tokens; query windows tile their grid (the last may be cut off).
        size: side of a key window in key tokens.
        stride: distance of neighbouring key windows in key tokens (= key tokens per query window).
    """

    queries: int
    size: int
    stride: int

    @property
    def before(self) -> int:
        """How far a key window reaches before its query window, in key tokens; the larger half reaches behind it."""
        return (self.size - self.stride) // 2

    def count(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Number of query windows along the axes of a grid of queries."""
        return padded_size(grid[0], self.queries) // self.queries, padded_size(grid[1], self.queries) // self.queries

    def mask(
        self, grid: tuple[int, int], key_grid: tuple[int, int], valid: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Boolean `(H*W, Hk*Wk)`: True where a query of `grid` may attend a key of `key_grid`.

        `valid` counts the rows and columns of the key grid that may be attended at all (padding comes last).
        """
        rows, columns = (
            self._axis_mask(length, keys, real, device)
            for length, keys, real in zip(grid, key_grid, valid, strict=True)
        )
        return rearrange(rows[:, None, :, None] & columns[None, :, None, :], "h w hk wk -> (h w) (hk wk)")

    def _axis_mask(self, length: int, keys: int, real: int, device: torch.device) -> Tensor:
        start = torch.arange(length, device=device) // self.queries * self.stride - self.before
        position = torch.arange(keys, device=device)
        inside = (position >= start[:, None]) & (position < start[:, None] + self.size)
        return inside & (position < real)

    def gather(self, maps: Tensor, count: tuple[int, int]) -> Tensor:
        """Cut key windows from `(B, Hk, Wk, C)`: `(B*windows, size*size, C)`; positions outside the map are zero."""
        height, width = maps.shape[1:3]
        behind = [(n - 1) * self.stride - self.before + self.size for n in count]
        maps = F.pad(maps, (0, 0, self.before, max(0, behind[1] - width), self.before, max(0, behind[0] - height)))
        windows = maps.unfold(1, self.size, self.stride).unfold(2, self.size, self.stride)
        windows = windows[:, : count[0], : count[1]]
        return rearrange(windows, "b nh nw c kh kw -> (b nh nw) (kh kw) c")


def window_attention(
    attn: Attention,
    x: Tensor,
    grid: tuple[int, int],
    y: Tensor,
    key_grid: tuple[int, int],
    windows: KeyWindows,
    *,
    valid: tuple[int, int] | None = None,
    method: str = "auto",
) -> Tensor:
    """Normalised tokens `x` `(B, H*W, C)` on `grid` attend those of `y` `(B, Hk*Wk, C)` inside their key window.

    Args:
        attn: projections and heads.
        x: queries in raster order of `grid`.
        grid: `(H, W)` of the queries.
        y: keys in raster order of `key_grid`.
        key_grid: `(Hk, Wk)` of the keys.
        windows: geometry of query and key windows.
        valid: leading rows and columns of the key grid that may be attended; default all.
        method: `gather` cuts key windows from the projected keys, `masked` is one dense attention with a boolean
            mask; `auto` takes the dense one where gathering would not shrink the work to less than half. Same result.

    Returns:
        `(B, H*W, C)`.

    Raises:
        ValueError: unknown method.
    """
    valid = key_grid if valid is None else valid
    if method == "auto":
        method = "gather" if 2 * windows.size**2 < key_grid[0] * key_grid[1] else "masked"
    if method == "masked":
        return attn(x, y, windows.mask(grid, key_grid, valid, x.device))
    if method != "gather":
        raise ValueError(f"unknown window attention method {method!r}: use 'auto', 'gather' or 'masked'")

    batch, count, side = x.shape[0], windows.count(grid), windows.queries
    tiled = (count[0] * side, count[1] * side)
    queries = rearrange(attn.q(x), "b (h w) c -> b h w c", h=grid[0])
    if tiled != grid:
        queries = F.pad(queries, (0, 0, 0, tiled[1] - grid[1], 0, tiled[0] - grid[0]))
    queries = split_windows(rearrange(queries, "b h w c -> b (h w) c"), tiled, side)
    keys = rearrange(attn.kv(y), "b (h w) c -> b h w c", h=key_grid[0])
    keys = windows.gather(keys, count)
    real = torch.ones(1, *key_grid, 1, dtype=torch.bool, device=x.device)
    real[:, valid[0] :] = False
    real[:, :, valid[1] :] = False
    mask = repeat(windows.gather(real, count), "n k 1 -> (b n) 1 1 k", b=batch)

    q = rearrange(queries, "n q (h d) -> n h q d", h=attn.num_heads)
    k, v = rearrange(keys, "n k (two h d) -> two n h k d", two=2, h=attn.num_heads).unbind(0)
    out = merge_windows(attn.attend(q, k, v, mask), tiled, side)
    if tiled != grid:
        out = rearrange(out, "b (h w) c -> b h w c", h=tiled[0])[:, : grid[0], : grid[1]].flatten(1, 2)
    return out
