"""Blobworld: scenes with a few coloured shapes on grey, drawn by numpy instead of downloaded.

Categories differ in hue and in the direction of their stripes, so that patch features of one object resemble each
other. A scene is a function of its seed alone.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from core.data import derive_seed

CATEGORIES = 6
SHAPES = ("ellipse", "rectangle", "triangle", "petals")
# Streams of random numbers, and the number of scenes by default.
_SPLITS = {"train": (0, 500), "val": (1, 80), "test": (2, 80)}
_STRIPES = 8  # cycles per image width


class Scene(NamedTuple):
    """A drawn scene.

    image       (S, S, 3) float32 in [0, 1]
    instances   (S, S) int32: 0 background, then objects in the order of painting
    categories  (S, S) int32: 0 background, then 1 + category
    """

    image: np.ndarray
    instances: np.ndarray
    categories: np.ndarray


def draw_scene(
    seed: int,
    size: int = 64,
    objects: tuple[int, int] = (2, 4),
    foreground: bool = False,
    repeat: bool = False,
    shape: str | None = None,
    clutter: int = 0,
) -> Scene:
    """The scene of a seed.

    Args:
        seed: key of the generator, 0 to 2^128 - 1.
        size: side of the picture in pixels.
        objects: smallest and largest number of objects.
        foreground: one large object near the middle instead.
        repeat: categories may occur twice, so that instances are not classes.
        shape: one of `SHAPES` for all objects; None: drawn for each.
        clutter: thin coloured strokes that belong to the background.

    Raises:
        ValueError: unknown shape, or more objects than categories without `repeat`.
    """
    least, most = (1, 1) if foreground else objects
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"Blobworld has no shape {shape!r}: use {', '.join(SHAPES)}")
    if not 1 <= least <= most or (most > CATEGORIES and not repeat):
        raise ValueError(f"Blobworld: objects={objects}; from 1 to {CATEGORIES} (or repeat=true), in order")
    rng = np.random.Generator(np.random.Philox(key=seed))
    y, x = np.mgrid[:size, :size] / size
    direction = rng.uniform(0, 2 * math.pi)
    grey = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.15), rng.uniform(0.35, 0.65))
    ramp = math.cos(direction) * (x - 0.5) + math.sin(direction) * (y - 0.5)
    image = np.clip(np.array(grey) + 0.25 * ramp[..., None], 0, 1)
    for _ in range(clutter):
        _paint_stroke(rng, image, x, y)
    count = 1 if foreground else int(rng.integers(least, most + 1))
    kinds = rng.integers(0, CATEGORIES, count) if repeat else rng.permutation(CATEGORIES)[:count]
    instances, categories = (np.zeros((size, size), np.int32) for _ in range(2))
    for number, kind in enumerate(kinds.tolist(), start=1):
        radius = rng.uniform(*((0.22, 0.34) if foreground else (0.13, 0.22)))
        bounds = (0.35, 0.65) if foreground else (0.15, 0.85)
        cx, cy = rng.uniform(*bounds), rng.uniform(*bounds)
        drawn = SHAPES[rng.integers(len(SHAPES))]
        inside = _inside(shape or drawn, *_turned(x - cx, y - cy, rng.uniform(0, 2 * math.pi)), radius)
        image[inside] = _colours(rng, kind, x[inside], y[inside])
        instances[inside] = number
        categories[inside] = 1 + kind
    image = np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
    return Scene(image.astype(np.float32), instances, categories)


def _colours(rng: np.random.Generator, kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours of an object's pixels `(P, 3)`: its category's hue, darkened by stripes in its direction."""
    hue = (kind / CATEGORIES + rng.normal(0, 0.012)) % 1
    colour = colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1), rng.uniform(0.75, 1))
    angle, phase = kind * math.pi / CATEGORIES, rng.uniform(0, 2 * math.pi)
    wave = np.sin(2 * math.pi * _STRIPES * (math.cos(angle) * x + math.sin(angle) * y) + phase)
    return np.array(colour) * (1 - 0.3 * (0.5 + 0.5 * wave))[:, None]


def _turned(dx: np.ndarray, dy: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the frame of an object that is turned by `angle`."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * dx + sine * dy, cosine * dy - sine * dx


def _inside(shape: str, u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    """Which points of an object's frame belong to it."""
    if shape == "ellipse":
        return u**2 + (v / 0.8) ** 2 < r**2
    if shape == "rectangle":
        return (np.abs(u) < 0.9 * r) & (np.abs(v) < 0.7 * r)
    if shape == "triangle":
        return (v > -0.6 * r) & (v < r - 1.8 * np.abs(u))
    return np.hypot(u, v) < r * (0.7 + 0.3 * np.cos(5 * np.arctan2(v, u)))


def _paint_stroke(rng: np.random.Generator, image: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    u, v = _turned(x - rng.uniform(), y - rng.uniform(), rng.uniform(0, 2 * math.pi))
    image[(np.abs(u) < 0.12) & (np.abs(v) < 0.015)] = colorsys.hsv_to_rgb(rng.uniform(), 0.85, 0.85)


Draw = Callable[[int], Scene]


class Scenes(Dataset):
    """Drawn scenes as samples; scene i of a split depends on the seed, the split and i alone, whatever the count.

    Args:
        name: in `sample_id`.
        draw: from a seed to a `Scene`; hashable, so that what is drawn once is kept.
        split: `train`, `val` or `test`.
        seed: of all scenes.
        count: number of scenes; None: 500 for training, else 80.
        foreground: samples have a `mask` of 0 and 1, and no `classes`.

    Raises:
        ValueError: unknown split, no scene, or what `draw` refuses.
    """

    fixed = True  # without augmentation: see `slot_walks.FeatureCache`

    def __init__(
        self, name: str, draw: Draw, split: str, seed: int, count: int | None = None, foreground: bool = False
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"{type(self).__name__} has no split {split!r}: use {', '.join(_SPLITS)}")
        self.name, self.split, self.foreground, self.seed = name, split, foreground, seed
        number = _SPLITS[split][1] if count is None else count
        if number < 1:
            raise ValueError(f"{type(self).__name__}: count is at least 1")
        self.images, self.instances, self.categories = _scenes(draw, split, seed, number)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Copies: the arrays are shared by all data sets with these settings.
        maps = {"mask": torch.from_numpy(self.instances[index].astype(np.int64))}
        if not self.foreground:
            maps["classes"] = torch.from_numpy(self.categories[index].astype(np.int64))
        image = torch.from_numpy(self.images[index].transpose(2, 0, 1).copy())
        return {"image": image, **maps, "sample_id": f"{self.name}-{self.split}-{self.seed}-{int(index)}"}


class Blobworld(Scenes):
    """Scenes of `draw_scene`.

    Samples: `image` `(3, size, size)` float32 in [0, 1]; `sample_id`; for object discovery `mask` (instances from 1
    on) and `classes` (1 + category), `(size, size)` int64 with 0 for background; with `foreground` only `mask`, 0 or 1.

    Args:
        split: `train` (500 scenes by default), `val` or `test` (80 each).
        foreground: foreground extraction, see `draw_scene`.
        count: number of scenes.
        seed: of all scenes.
        size, objects, repeat, shape, clutter: see `draw_scene`.

    Raises:
        ValueError: unknown split, or what `draw_scene` refuses.
    """

    def __init__(
        self,
        split: str = "train",
        foreground: bool = False,
        count: int | None = None,
        seed: int = 0,
        size: int = 64,
        objects: tuple[int, int] = (2, 4),
        repeat: bool = False,
        shape: str | None = None,
        clutter: int = 0,
    ) -> None:
        options = (size, (int(objects[0]), int(objects[1])), foreground, repeat, shape, clutter)
        super().__init__("blobworld", Drawing(draw_scene, options), split, seed, count, foreground)


def scene_seed(split: str, seed: int, index: int) -> int:
    """The seed of a scene of a split."""
    return derive_seed(seed, _SPLITS[split][0], index)


class Drawing(NamedTuple):
    """A function with its options: equal where both are."""

    function: Callable[..., Scene]
    options: tuple[Any, ...]

    def __call__(self, seed: int) -> Scene:
        return self.function(seed, *self.options)


@lru_cache(maxsize=8)
def _scenes(draw: Draw, split: str, seed: int, count: int) -> tuple[np.ndarray, ...]:
    scenes = [draw(scene_seed(split, seed, index)) for index in range(count)]
    arrays = tuple(np.stack(part) for part in zip(*scenes, strict=True))
    for array in arrays:
        array.flags.writeable = False
    return arrays
