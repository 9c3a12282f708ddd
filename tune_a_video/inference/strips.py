"""Videos as strips of frames under each other, with what each is: a page of results in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tune_a_video.data.video_io import to_pixels

_LINE, _GAP = 22, 4


def strips(
    videos: Sequence[tuple[str, Tensor]], *, frames: int = 8, smallest: int = 96, width: int = 1600
) -> np.ndarray:
    """A row of frames for every video, its name above.

    Args:
        videos: names, and `(3, f, H, W)` in [0, 1] each.
        frames: at most so many of each, evenly chosen.
        smallest: height in pixels to which small frames are enlarged, by whole factors, so that pixels stay visible.
        width: of the picture at most; larger frames are made smaller.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        ValueError: no videos.
    """
    if not videos:
        raise ValueError("no videos to show")
    rows = [(name, _chosen(to_pixels(video), frames)) for name, video in videos]
    height, side = rows[0][1].shape[1:3]
    most = max(len(row) for _, row in rows)
    factor = max(1, math.ceil(smallest / height))
    scale = min(factor, ((width - _GAP) / most - _GAP) / side)
    size = (max(1, int(side * scale)), max(1, int(height * scale)))
    step = size[1] + _LINE + _GAP
    sheet = Image.new("RGB", (most * (size[0] + _GAP) + _GAP, len(rows) * step + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (name, row) in enumerate(rows):
        top = number * step + _GAP
        draw.text((_GAP, top + 1), name, "black", font)
        for column, frame in enumerate(row):
            picture = Image.fromarray(frame).resize(size, Image.NEAREST if scale >= 1 else Image.LANCZOS)
            sheet.paste(picture, (_GAP + column * (size[0] + _GAP), top + _LINE))
    return np.asarray(sheet)


def _chosen(pixels: np.ndarray, frames: int) -> np.ndarray:
    """At most `frames` of `(f, H, W, 3)`, the first and the last among them."""
    if len(pixels) <= frames:
        return pixels
    return pixels[np.linspace(0, len(pixels) - 1, frames).round().astype(int)]
