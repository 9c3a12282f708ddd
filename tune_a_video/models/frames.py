"""How many frames belong together, and the layout in which all travels here: rows `(b f)`, frames fastest."""

from __future__ import annotations

import torch
from torch import Tensor


def recorded() -> bool:
    """Whether the network is being exported, compiled or traced: then sizes may be symbols, and decide nothing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class FrameCount:
    """The number of frames f of the videos that are passing through a network.

    Modules of diffusers see folded rows `(b f)` and cannot tell which belong to one video. Those that have to know
    share one of these objects; the network's forward pass sets it. It is no module: it has no parameters, is not saved,
    and a deep copy of the network still shares one among all of its parts.
    """

    def __init__(self, frames: int = 1) -> None:
        self.frames = frames
        #: Whether all frames of a video read the same text; then its keys and values are computed once per video.
        self.shared_text = False

    def videos(self, rows: int) -> int:
        """The number of videos b in `rows = b f` rows.

        Raises:
            ValueError: the rows are no whole videos.
        """
        if not recorded() and rows % self.frames:
            raise ValueError(f"{rows} rows are not whole videos of {self.frames} frames")
        return rows // self.frames


def fold(video: Tensor) -> Tensor:
    """`(b, c, f, h, w)` to rows `(b f, c, h, w)`."""
    return video.transpose(1, 2).flatten(0, 1)


def unfold(rows: Tensor, frames: int) -> Tensor:
    """Rows `(b f, c, h, w)` to `(b, c, f, h, w)`."""
    return rows.unflatten(0, (-1, frames)).transpose(1, 2)
