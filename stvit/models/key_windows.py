"""Which keys a window of queries sees, and the masks and index tables that say so.

Windows tile the queries; each has a window of keys around it. Padding is never attended, except where the released
dense layers do so (`ReleasedPadding`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from stvit.models.windows import padded_size


@dataclass(frozen=True)
class KeyWindows:
    """Which keys each query window sees: along either axis window i sees `[start(i), start(i) + size)`.

    Attributes:
        queries: side of a query window in query tokens; query windows tile their grid (the last may be cut off).
        size: side of a key window in key tokens.
        stride: distance of neighbouring key windows in key tokens (= key tokens per query window).
        lead: how far a key window begins before its query window, in key tokens; None centres it (the larger half of
            an odd rest lies behind).
        inside: whether key windows that would leave the map are moved back into it; the others keep their place and
            lose what lies outside.
    """

    queries: int
    size: int
    stride: int
    lead: int | None = None
    inside: bool = False

    @property
    def before(self) -> int:
        """How far a key window reaches before its query window, in key tokens."""
        return (self.size - self.stride) // 2 if self.lead is None else self.lead

    def count(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Number of query windows along the axes of a grid of queries."""
        return padded_size(grid[0], self.queries) // self.queries, padded_size(grid[1], self.queries) // self.queries

    def starts(self, count: int, keys: int, device: torch.device) -> Tensor:
        """First key `(count,)` of every window along an axis with `keys` keys; may be negative."""
        return torch.tensor([self.start(i, keys) for i in range(count)], device=device)

    def start(self, index: int, keys: int) -> int:
        """First key of window `index` along an axis with `keys` keys; may be negative."""
        start = index * self.stride - self.before
        return min(max(start, 0), max(keys - self.size, 0)) if self.inside else start

    def within(self, count: int, keys: int, device: torch.device) -> Tensor:
        """Boolean `(count, keys)`: which keys of an axis lie in the window."""
        offset = torch.arange(keys, device=device) - self.starts(count, keys, device)[:, None]
        return (offset >= 0) & (offset < self.size)


@dataclass(frozen=True)
class ReleasedPadding:
    """What the released dense layers let queries see of zero padding, quirk included.

    They pad the keys' map at the bottom and right to `grid` and mask the rectangle `rows[-bottom:] x columns[-right:]`
    of it and whatever of a key window lies outside. `-0` selects everything, and softmax does not notice a mask on all
    keys of a window; so the masked part is a corner, a strip or nothing at all, and in windows that are masked
    throughout the zeros outside are attended as well. All zeros give one and the same key.

    Attributes:
        grid: `(height, width)` of the keys' map with its padding.
        bottom: rows of padding (of image tokens, also where the keys are semantic tokens).
        right: columns of padding.
        masked: False leaves out the mask: every zero is attended.
    """

    grid: tuple[int, int]
    bottom: int
    right: int
    masked: bool = True

    def visible(
        self, windows: KeyWindows, count: tuple[int, int], key_grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Boolean `(nh, nw, Hk, Wk)` of the attended keys of `key_grid`, and attended zeros a window, `(nh, nw)`."""
        hidden, inside = [], []
        for axis, padding in enumerate((self.bottom, self.right)):
            position = torch.arange(self.grid[axis], device=device)
            hidden.append(position >= (self.grid[axis] - padding if padding else 0))
            inside.append(windows.within(count[axis], self.grid[axis], device))
        seen = _outer(*inside)
        if self.masked:
            open_ = seen & ~(hidden[0][:, None] & hidden[1])
            blind = ~open_.flatten(2).any(dim=-1)
            seen = open_ | (seen & blind[..., None, None])
            zeros = seen.sum(dim=(-2, -1)) + blind * (windows.size**2 - seen.sum(dim=(-2, -1)))
        else:
            zeros = torch.full(count, windows.size**2, device=device)
        seen = seen[..., : key_grid[0], : key_grid[1]]
        return seen, zeros - seen.sum(dim=(-2, -1))


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """`(nh, Hk)` and `(nw, Wk)` to `(nh, nw, Hk, Wk)`."""
    return rows[:, None, :, None] & columns[None, :, None, :]


@dataclass(frozen=True)
class WindowKeys:
    """Everything that decides which keys a query of a windowed attention sees; hashable, so that masks are remembered.

    Attributes:
        windows: geometry.
        grid: `(H, W)` of the queries.
        key_grid: `(Hk, Wk)` of the keys.
        valid: leading rows and columns of the key grid that may be attended; ignored with `released`.
        released: attended padding, see `ReleasedPadding`; None: padding is never attended.
        own: where tokens on the grid of the queries are further keys of their own window, the leading rows and columns
            of them that may be attended; None: there are none.
    """

    windows: KeyWindows
    grid: tuple[int, int]
    key_grid: tuple[int, int]
    valid: tuple[int, int]
    released: ReleasedPadding | None = None
    own: tuple[int, int] | None = None

    @property
    def count(self) -> tuple[int, int]:
        """Number of query windows along either axis."""
        return self.windows.count(self.grid)

    @property
    def tiled(self) -> tuple[int, int]:
        """Query grid filled up to whole windows."""
        return self.count[0] * self.windows.queries, self.count[1] * self.windows.queries

    def visible(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Boolean `(nh, nw, Hk, Wk)` of the attended keys, and how often a window attends padding, `(nh, nw)`."""
        if self.released is not None:
            return self.released.visible(self.windows, self.count, self.key_grid, device)
        axes = []
        for count, keys, valid in zip(self.count, self.key_grid, self.valid, strict=True):
            inside = self.windows.within(count, keys, device)
            axes.append(inside & (torch.arange(keys, device=device) < valid))
        return _outer(*axes), None

    def bands(self) -> list[Band]:
        """The rows of windows, one after the other."""
        side = self.windows.queries
        last = self.key_grid[0] if self.released is not None else self.valid[0]
        bands = []
        for index in range(self.count[0]):
            start = self.windows.start(index, self.key_grid[0])
            queries = (index * side, min((index + 1) * side, self.grid[0]))
            bands.append(Band(queries, (max(start, 0), min(start + self.windows.size, last))))
        return bands


@dataclass(frozen=True)
class Band:
    """A row of windows: `[first, stop)` rows of queries and the rows of keys that any of them sees."""

    queries: tuple[int, int]
    keys: tuple[int, int]


def dense_mask(keys: WindowKeys, *, device: torch.device) -> Tensor:
    """Mask `(H*W, M)` of one attention of all queries on all keys.

    The keys are the tokens on the queries' grid (where `keys.own`), `key_grid`, and padding (where `keys.released`).
    Boolean, or with padding additive: a key that stands for n equal ones has `log n`.
    """
    visible, zeros = keys.visible(device)
    return _per_query(keys, visible, zeros, Band((0, keys.grid[0]), (0, keys.key_grid[0])))


def band_masks(keys: WindowKeys, *, device: torch.device) -> tuple[Tensor, ...]:
    """`dense_mask` of every band by itself: its queries on its rows of keys."""
    visible, zeros = keys.visible(device)
    return tuple(_per_query(keys, visible, zeros, band) for band in keys.bands())


def _per_query(keys: WindowKeys, visible: Tensor, zeros: Tensor | None, band: Band) -> Tensor:
    rows = torch.arange(*band.queries, device=visible.device)
    columns = torch.arange(keys.grid[1], device=visible.device)
    window = (rows // keys.windows.queries, columns // keys.windows.queries)
    seen = visible[window[0]][:, window[1], slice(*band.keys)]
    mask = rearrange(seen, "h w hk wk -> (h w) (hk wk)")
    if keys.own is not None:
        same = [a[:, None] == a for a in window]
        own = _outer(same[0] & (rows < keys.own[0]), same[1] & (columns < keys.own[1]))
        mask = torch.cat([rearrange(own, "h w hk wk -> (h w) (hk wk)"), mask], dim=1)
    if zeros is None:
        return mask
    return torch.cat([_additive(mask), zeros.float().log()[window[0]][:, window[1]].reshape(-1, 1)], dim=1)


def gather_index(keys: WindowKeys, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """For one attention per window: the keys it reads, `(nh*nw, K)`, and its mask `(nh*nw, K)`.

    Keys are numbered in the order of `dense_mask`. `K` counts the own queries, the key window and padding.
    """
    visible, zeros = keys.visible(device)
    starts = [keys.windows.starts(n, k, device) for n, k in zip(keys.count, keys.key_grid, strict=True)]
    rows, columns = (start[:, None] + torch.arange(keys.windows.size, device=device) for start in starts)
    index, mask = _positions(rows, columns, keys.key_grid)
    mask &= rearrange(visible, "nh nw h w -> (nh nw) (h w)").gather(1, index)
    total = keys.key_grid[0] * keys.key_grid[1]
    if keys.own is not None:
        side = keys.windows.queries
        rows, columns = (torch.arange(n * side, device=device).reshape(n, side) for n in keys.count)
        own, _ = _positions(rows, columns, keys.grid)
        real = _positions(rows, columns, keys.own)[1]
        before = keys.grid[0] * keys.grid[1]
        index, mask = torch.cat([own, index + before], dim=1), torch.cat([real, mask], dim=1)
        total += before
    if zeros is not None:
        index = torch.cat([index, index.new_full((len(index), 1), total)], dim=1)
        mask = torch.cat([_additive(mask), zeros.float().log().reshape(-1, 1)], dim=1)
    return index, mask


def _positions(rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Raster positions of `rows` `(nh, a)` x `columns` `(nw, b)`, `(nh*nw, a*b)`, and which of them lie on the grid.

    What lies outside is moved to the nearest position inside.
    """
    inside = _outer((rows >= 0) & (rows < grid[0]), (columns >= 0) & (columns < grid[1]))
    rows, columns = rows.clamp(0, grid[0] - 1), columns.clamp(0, grid[1] - 1)
    index = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    return tuple(rearrange(t, "nh nw a b -> (nh nw) (a b)") for t in (index, inside))


def _additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
