"""Windows on rasters of tokens: splitting, joining, padding and cropping."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def split_windows(x: Tensor, grid: tuple[int, int], window: int | tuple[int, int]) -> Tensor:
    """Cut raster tokens `(B, H*W, C)` into windows `(B*windows, N, C)`, windows and their N tokens in raster order.

    `window` is `(height, width)`, or one number for a square.

    Raises:
        ValueError: the windows do not tile the grid.
    """
    return rearrange(x, "b (nh wh nw ww) c -> (b nh nw) (wh ww) c", **_tiling(grid, window))


def merge_windows(x: Tensor, grid: tuple[int, int], window: int | tuple[int, int]) -> Tensor:
    """Inverse of `split_windows`: `(B*windows, N, C)` back to raster tokens `(B, H*W, C)`."""
    return rearrange(x, "(b nh nw) (wh ww) c -> b (nh wh nw ww) c", **_tiling(grid, window))


def _tiling(grid: tuple[int, int], window: int | tuple[int, int]) -> dict[str, int]:
    height, width = (window, window) if isinstance(window, int) else window
    if grid[0] % height or grid[1] % width:
        raise ValueError(
            f"a {grid[0]}x{grid[1]} token grid cannot be cut into {height}x{width} windows: pad it to a multiple"
        )
    return dict(nh=grid[0] // height, nw=grid[1] // width, wh=height, ww=width)


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


def pad_grid(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Zero rows and columns behind raster tokens `(B, H*W, C)` until `grid` is as large as `to`."""
    if grid == to:
        return x
    x = F.pad(rearrange(x, "b (h w) c -> b h w c", h=grid[0]), (0, 0, 0, to[1] - grid[1], 0, to[0] - grid[0]))
    return x.flatten(1, 2)


def crop_grid(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """The leading `to` rows and columns of raster tokens `(B, H*W, C)` on `grid`."""
    if grid == to:
        return x
    return rearrange(x, "b (h w) c -> b h w c", h=grid[0])[:, : to[0], : to[1]].flatten(1, 2)


def into_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """`split_windows` of a grid that is zero-padded to whole windows first."""
    tiled = (padded_size(grid[0], window), padded_size(grid[1], window))
    return split_windows(pad_grid(x, grid, tiled), tiled, window)


def out_of_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Inverse of `into_windows`: the padding is cut off."""
    tiled = (padded_size(grid[0], window), padded_size(grid[1], window))
    return crop_grid(merge_windows(x, tiled, window), tiled, grid)
