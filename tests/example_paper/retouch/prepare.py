"""Data that is drawn: `tools/prepare_data.py paper=retouch task=retouch_images output=FOLDER`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from core.data.prepare import preparer


@preparer("retouch_images")
def retouch_images(output: Path, train: int = 64, val: int = 16, size: int = 16, seed: int = 0) -> str:
    """Images of a coloured disc on a gradient, as PNG files in output/train and output/val.

    Args:
        output: folder of the data set.
        train: images to train on.
        val: images to judge by.
        size: height and width in pixels.
        seed: of the drawing.
    """
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        folder = output / split
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(_draw(generator, size)).save(folder / f"{number:05d}.png")
    return f"{train} and {val} images in {output}"


def _draw(generator: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    colours = generator.random((3, 3))
    image = colours[0] * x[..., None] + colours[1] * (1 - x[..., None])
    centre, radius = generator.uniform(0.3, 0.7, 2), generator.uniform(0.15, 0.35)
    image[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = colours[2]
    return (image * 255).astype(np.uint8)
