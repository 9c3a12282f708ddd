"""A picture of cue swap: what counts in the source and in the target; ``python -m petl.standin.picture FILE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from petl.standin.cue_swap import CELL, CELLS, CueSwap, to_rgb


def world_page(count: int = 8, seed: int = 0, scale: int = 4) -> Image.Image:
    """Two rows of `count` images, source above target, each with a frame around the object that counts."""
    edge, side = 6, 32 * scale
    page = Image.new("RGB", (count * (side + edge) + edge, 2 * (side + edge) + edge), "white")
    draw = ImageDraw.Draw(page)
    for row, domain in enumerate(("source", "target")):
        drawn = CueSwap(domain, "test", seed, count).drawn
        pixels = (to_rgb(drawn.image) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for column in range(count):
            left, top = edge + column * (side + edge), edge + row * (side + edge)
            picture = Image.fromarray(np.ascontiguousarray(pixels[column]))
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
            place = int(drawn.factors[column, 0])
            x, y = left + place % CELLS * CELL * scale, top + place // CELLS * CELL * scale
            draw.rectangle((x, y, x + CELL * scale - 1, y + CELL * scale - 1), outline="white", width=2)
    return page


def main(words: Sequence[str]) -> None:
    """Writes the picture to the file that is named."""
    if len(words) != 1:
        sys.exit("usage: python -m petl.standin.picture FILE.png")
    world_page().save(words[0], optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
