"""Initial cluster centres: a token map pooled to a small grid (section 3.2, equations 4 and 5 of the STViT paper).

Maps are channels-last, `(B, H, W, C)`. `build_pool` makes the variants by name.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.layers.recorded import fixed

POOLS = ("max", "avg", "weighted", "weighted_offset")


def adaptive_cells(size: int, cells: int) -> list[tuple[int, int]]:
    """`[start, stop)` of each adaptive pooling cell along an axis of `size` positions.

    Cell i starts at `floor(i*size/cells)` and stops at `ceil((i+1)*size/cells)`; neighbours overlap by one position
    where `size` is no multiple of `cells` (7 to 3: `[0,3) [2,5) [4,7)`).
    """
    return [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]


class AdaptivePool(nn.Module):
    """Maximum or average over the cells of a grid; has no parameters.

    Args:
        kind: `max` or `avg`.
        grid: `(height, width)` of the result.
    """

    def __init__(self, kind: str, grid: tuple[int, int]) -> None:
        super().__init__()
        if kind not in ("max", "avg"):
            raise ValueError(f"unknown adaptive pooling {kind!r}: use 'max' or 'avg'")
        self.kind = kind
        self.grid = grid

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pool `(B, H, W, C)` to `(B, height, width, C)`.

        `valid` `(B, H, W)` (boolean) marks the positions that count; a cell without any gives 0.
        """
        x = rearrange(x, "b h w c -> b c h w")
        if valid is None:
            return rearrange(pooled(x, self.kind, self.grid), "b c h w -> b h w c")
        valid = valid[:, None]
        if self.kind == "max":
            cells = pooled(x.masked_fill(~valid, float("-inf")), "max", self.grid)
            cells = cells.masked_fill(cells == float("-inf"), 0.0)
        else:
            share = pooled(valid.to(x.dtype), "avg", self.grid)
            cells = pooled(x * valid, "avg", self.grid) / share.clamp_min(torch.finfo(x.dtype).tiny)
        return rearrange(cells, "b c h w -> b h w c")

    def extra_repr(self) -> str:
        return f"{self.kind}, grid={self.grid}"


def pooled(x: Tensor, kind: str, grid: tuple[int, int]) -> Tensor:
    """Maximum or average of `(B, C, H, W)` over the cells of `grid`, as PyTorch's adaptive pooling computes them.

    ONNX has no adaptive pooling. Cells of one size and distance (14 to 7, 7 to 3) are an ordinary pooling; in an export
    the others are taken one by one.
    """
    cells = [adaptive_cells(size, count) for size, count in zip(fixed(x, 2, 3), grid, strict=True)]
    sides = [{stop - start for start, stop in axis} for axis in cells]
    steps = [{b[0] - a[0] for a, b in pairwise(axis)} or {1} for axis in cells]
    if all(len(found) == 1 and 0 not in found for found in (*sides, *steps)):
        kernel, stride = ([found.copy().pop() for found in axes] for axes in (sides, steps))
        return F.max_pool2d(x, kernel, stride) if kind == "max" else F.avg_pool2d(x, kernel, stride)
    if not (torch.jit.is_tracing() or torch.compiler.is_exporting()):
        return F.adaptive_max_pool2d(x, grid) if kind == "max" else F.adaptive_avg_pool2d(x, grid)
    reduce = torch.amax if kind == "max" else torch.mean
    rows = torch.stack([reduce(x[:, :, start:stop], dim=2) for start, stop in cells[0]], dim=2)
    return torch.stack([reduce(rows[..., start:stop], dim=3) for start, stop in cells[1]], dim=3)


class PositionScore(nn.Module):
    """`Conv1x1(GELU(LN(DWConv3x3(x))))`: the form of both the mask and the offset of equations 4 and 5.

    Args:
        dim: channels in.
        out_dim: channels out (1 for the mask, C for the offset).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.proj = nn.Linear(dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)` to `(B, H, W, out_dim)`."""
        # The permuted view is a channels_last tensor, so no layout is copied on the way in or out.
        x = rearrange(self.conv(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")
        return self.proj(F.gelu(self.norm(x)))


class WeightedPool(nn.Module):
    """Centres as weighted means of disjoint windows, the weights learned from the content of each window.

    The map is zero-padded so that `grid` windows tile it (padding split evenly, the odd row or column behind). On each
    window separately, a `PositionScore` gives one logit per position; padded positions get -100; the softmax over the
    window weighs its tokens. With `offset`, a second `PositionScore` on the grid of centres is added to them. The
    paper's code is not public: the mask follows what its author posted, the offset's exact form is a reading.

    Args:
        dim: channels C.
        grid: `(height, width)` of the result.
        offset: whether centres of neighbouring windows shift each other (equation 5).
    """

    def __init__(self, dim: int, grid: tuple[int, int], *, offset: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.mask = PositionScore(dim, 1)
        self.offset = PositionScore(dim, dim) if offset else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pool `(B, H, W, C)` to `(B, height, width, C)`.

        `valid` `(B, H, W)` (boolean) marks the positions that count; the others are treated like padding.
        """
        height, width = fixed(x, 1, 2)
        before_h, after_h, before_w, after_w = self._padding(height, width)
        padded = (before_h, after_h, before_w, after_w) != (0, 0, 0, 0)
        if padded and valid is None:
            valid = torch.ones(1, height, width, dtype=torch.bool, device=x.device)
        if valid is not None:
            x = x * valid[..., None]
        if padded:
            x = F.pad(x, (0, 0, before_w, after_w, before_h, after_h))
            valid = F.pad(valid, (before_w, after_w, before_h, after_h))
        windows = self._windows(x)
        score = rearrange(self.mask(windows), "n h w 1 -> n (h w)").float()
        if valid is not None:
            blank = rearrange(self._windows(valid[..., None]), "n h w 1 -> n (h w)")
            cells = self.grid[0] * self.grid[1]
            score, blank = (rearrange(one, "(b n) p -> b n p", n=cells) for one in (score, blank))
            score = (score - 100.0 * ~blank).flatten(0, 1)
        weight = score.softmax(dim=-1).to(x.dtype)
        centres = (weight[:, None] @ rearrange(windows, "n h w c -> n (h w) c")).squeeze(1)
        centres = rearrange(centres, "(b gh gw) c -> b gh gw c", gh=self.grid[0], gw=self.grid[1])
        return centres if self.offset is None else centres + self.offset(centres)

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        total_h = -(-height // self.grid[0]) * self.grid[0] - height
        total_w = -(-width // self.grid[1]) * self.grid[1] - width
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2

    def _windows(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (gh h) (gw w) c -> (b gh gw) h w c", gh=self.grid[0], gw=self.grid[1])


def build_pool(kind: str, dim: int, grid: tuple[int, int]) -> AdaptivePool | WeightedPool:
    """The pooling named `kind`: `max`, `avg`, `weighted` (equation 4) or `weighted_offset` (equations 4 and 5).

    Both map `(B, H, W, C)` to `(B, *grid, C)`.

    Raises:
        ValueError: unknown kind.
    """
    if kind in ("max", "avg"):
        return AdaptivePool(kind, grid)
    if kind in ("weighted", "weighted_offset"):
        return WeightedPool(dim, grid, offset=kind == "weighted_offset")
    raise ValueError(f"unknown pool {kind!r}: use one of {', '.join(POOLS)}")
