"""Windows over time and space on token clips `(B, T, H, W, C)`: cutting, shifting, padding and the masks for it.

Sizes, windows and shifts are `(frames, rows, columns)`, counted in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core.layers.recorded import fixed
from stvit.models.windows import padded_size

Size = tuple[int, int, int]


@dataclass(frozen=True)
class ClipWindows:
    """How a clip is cut into windows; hashable, so that masks are remembered.

    Attributes:
        size: of the clip.
        window: of a window; windows tile the clip once it is padded at its ends.
        shift: how far the clip is rolled towards its beginning before it is cut.
    """

    size: Size
    window: Size
    shift: Size = (0, 0, 0)

    @classmethod
    def fit(cls, size: Size, window: Size, shift: Size = (0, 0, 0)) -> ClipWindows:
        """Windows for a clip: along an axis no longer than the window, the whole axis is one and nothing is shifted."""
        whole = [length <= side for length, side in zip(size, window, strict=True)]
        return cls(
            tuple(size),
            tuple(length if w else side for w, length, side in zip(whole, size, window, strict=True)),
            tuple(0 if w else by for w, by in zip(whole, shift, strict=True)),
        )

    @property
    def padded(self) -> Size:
        """The clip's size, filled up to whole windows."""
        return tuple(padded_size(length, side) for length, side in zip(self.size, self.window, strict=True))

    @property
    def count(self) -> int:
        """Number of windows."""
        total = 1
        for length, side in zip(self.padded, self.window, strict=True):
            total *= length // side
        return total

    def split(self, x: Tensor) -> Tensor:
        """Cut `(B, T, H, W, C)` into windows `(B, windows, N, C)`; padding is zeros."""
        x = pad_clip(x, self.padded)
        if any(self.shift):
            x = torch.roll(x, [-by for by in self.shift], dims=(1, 2, 3))
        return _cut(x, self.window)

    def merge(self, windows: Tensor) -> Tensor:
        """Inverse of `split`: the padding is cut off."""
        counts = [length // side for length, side in zip(self.padded, self.window, strict=True)]
        x = rearrange(
            windows,
            "b (nt nh nw) (t h w) c -> b (nt t) (nh h) (nw w) c",
            **dict(zip(("nt", "nh", "nw"), counts, strict=True)),
            **dict(zip("thw", self.window, strict=True)),
        )
        if any(self.shift):
            x = torch.roll(x, self.shift, dims=(1, 2, 3))
        return x[:, : self.size[0], : self.size[1], : self.size[2]]

    def needs_mask(self, mask_padding: bool) -> bool:
        """Whether there are tokens in one window that may not attend each other."""
        return any(self.shift) or (mask_padding and self.padded != self.size)


def pad_clip(x: Tensor, to: Size) -> Tensor:
    """Zeros behind `(B, T, H, W, C)` until it has the size `to`."""
    missing = [wanted - length for wanted, length in zip(to, fixed(x, 1, 2, 3), strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))


def window_mask(windows: ClipWindows, mask_padding: bool, *, device: torch.device) -> Tensor:
    """Boolean `(windows, N, N)`: which token of a window may attend which.

    Rolling brings ends together that were apart, so a window at the end holds up to eight pieces of the clip; tokens
    attend their own piece. With `mask_padding` padding is a piece of its own: nothing real attends it, and no token is
    left without any key.
    """
    pieces = []
    for length, side, by in zip(windows.padded, windows.window, windows.shift, strict=True):
        position = torch.arange(length, device=device)
        pieces.append((position >= length - side).long() + (position >= length - by).long() if by else 0 * position)
    piece = 9 * pieces[0][:, None, None] + 3 * pieces[1][:, None] + pieces[2]
    if mask_padding:
        real = pad_clip(torch.ones(1, *windows.size, 1, dtype=torch.bool, device=device), windows.padded)
        rolled = torch.roll(real, [-by for by in windows.shift], dims=(1, 2, 3))
        piece = piece.masked_fill(~rolled[0, ..., 0], -1)
    piece = _cut(piece[None, ..., None], windows.window)[0, ..., 0]
    return piece[:, :, None] == piece[:, None, :]


def relative_position_index(window: Size, table: Size, *, device: torch.device) -> Tensor:
    """Row of a bias table for every (query, key) pair of a window, int64 `(N, N)`.

    The table holds the offsets inside a window of size `table`, at least `window`: time first, then rows, then columns,
    each shifted to start at zero (the layout of Video Swin's tables).
    """
    axes = torch.meshgrid(*(torch.arange(side, device=device) for side in window), indexing="ij")
    index = torch.zeros((), dtype=torch.long, device=device)
    for axis, side in zip(axes, table, strict=True):
        position = axis.flatten()
        index = index * (2 * side - 1) + position[:, None] - position[None, :] + side - 1
    return index


def _cut(x: Tensor, window: Size) -> Tensor:
    return rearrange(
        x,
        "b (nt t) (nh h) (nw w) c -> b (nt nh nw) (t h w) c",
        **dict(zip("thw", window, strict=True)),
    )
