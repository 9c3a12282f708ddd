"""GlyphField: procedural glyphs on clutter, drawn by numpy."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

GLYPHS = ("disc", "ring", "square", "frame", "triangle", "plus", "saltire", "bar")
_FIELD_SPLITS = {"train": (0, 4096), "test": (1, 1024), "val": (2, 1024)}
_ATTEMPTS = 1000
#: Colours of glyphs and background, noise included, are nearly all within these bounds.
DARKEST, BRIGHTEST = -0.9, 2.0


class GlyphField(Dataset):
    """GlyphField-8: bright glyphs of eight shapes on a noisy background of gratings, made by numpy.

    With one glyph the label is its shape; with two it is the ordered pair of shapes, the left one first (64 classes),
    and so on. Glyphs do not overlap, and their centres are at least one largest radius apart from left to right, so
    that the order is clear.

    Sample i is a function of the seed, the split and i alone, whatever `count`. With seed 0 the train stream is numpy's
    `default_rng([0, i])`, the test stream `default_rng([1, i])`; seed s has streams 3s, 3s+1 and (val) 3s+2.

    Samples: `image` `(3, size, size)` float32; `label` int; `sample_id`; with `mask`, also `mask` `(size, size)` int64,
    0 for background and 1 + shape on a glyph.

    Args:
        split: `train`, `test` or `val`.
        size: side of the image; lengths below are at 28 pixels and grow with it.
        count: number of samples; None for 4096 (train) or 1024.
        glyphs: number of glyphs in an image.
        radius: smallest and largest radius.
        clutter: number of thin strokes of a glyph's colours and size, turned any way, behind the glyphs.
        seed: of all images.
        flip: probability of mirroring a sample, its label included; drawn from numpy's global generator.
        mask: also give the dense target.

    Raises:
        ValueError: unknown split, or glyphs that do not fit into the image.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 28,
        count: int | None = None,
        glyphs: int = 1,
        radius: tuple[float, float] = (4.5, 7.0),
        clutter: int = 0,
        seed: int = 0,
        flip: float = 0.0,
        mask: bool = False,
    ) -> None:
        if split not in _FIELD_SPLITS:
            raise ValueError(f"GlyphField has no split {split!r}: use {', '.join(_FIELD_SPLITS)}")
        stream, default_count = _FIELD_SPLITS[split]
        self.images, self.shapes, self.masks = _glyph_field(
            3 * seed + stream,
            default_count if count is None else count,
            size,
            glyphs,
            (float(radius[0]), float(radius[1])),
            clutter,
        )
        self.split, self.size, self.glyphs, self.seed, self.flip, self.mask = split, size, glyphs, seed, flip, mask
        self.num_classes = len(GLYPHS) ** glyphs

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        flipped = self.flip > 0 and np.random.random() < self.flip
        image, mask, shapes = self.images[index], self.masks[index], self.shapes[index]
        if flipped:
            image, mask, shapes = image[..., ::-1], mask[..., ::-1], shapes[::-1]
        sample: dict[str, Any] = {
            "image": torch.from_numpy(image.copy()),
            "label": int(np.ravel_multi_index(tuple(shapes), (len(GLYPHS),) * self.glyphs)),
            "sample_id": f"glyphs-{self.split}-{self.seed}-{index}",
        }
        if self.mask:
            sample["mask"] = _as_long(mask)
        return sample


def to_pixels(colours: np.ndarray) -> np.ndarray:
    """Rendered colours as uint8 of the same shape; the few outside of `DARKEST` to `BRIGHTEST` are cut off."""
    return np.round(255 * np.clip((colours - DARKEST) / (BRIGHTEST - DARKEST), 0, 1)).astype(np.uint8)


def _as_long(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(mask.astype(np.int64))


@lru_cache(maxsize=8)
def _glyph_field(
    stream: int, count: int, size: int, glyphs: int, radius: tuple[float, float], clutter: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All images `(count, 3, S, S)` float32, shapes left to right `(count, glyphs)` and masks `(count, S, S)` uint8."""
    images = np.empty((count, 3, size, size), np.float32)
    shapes = np.empty((count, glyphs), np.int64)
    masks = np.empty((count, size, size), np.uint8)
    y, x = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32), indexing="ij")
    scale = size / 28
    bounds = (radius[0] * scale, radius[1] * scale)
    for i in range(count):
        rng = np.random.default_rng([stream, i])
        image = _gratings(rng, x, y, scale)
        mask = np.zeros((size, size), np.uint8)
        for _ in range(clutter):
            stroke = _stroke(rng, x, y, bounds)
            image[:, stroke] = _colour(rng)
        shapes[i] = rng.integers(len(GLYPHS), size=glyphs)
        for shape, (cx, cy, r) in zip(shapes[i], _layout(rng, size, glyphs, bounds), strict=True):
            u, v = _unit_coordinates(x - cx, y - cy, r, rng.uniform(-0.35, 0.35))
            inside = _inside(GLYPHS[shape], u, v)
            image[:, inside] = _colour(rng)
            mask[inside] = shape + 1
        images[i] = image + 0.15 * rng.standard_normal(image.shape, dtype=np.float32)
        masks[i] = mask
    for array in (images, shapes, masks):
        array.flags.writeable = False  # shared by all data sets with these settings
    return images, shapes, masks


def _gratings(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, scale: float) -> np.ndarray:
    """Background `(3, S, S)`: three gratings of random frequency, direction, phase and colour."""
    frequency, angle = rng.uniform(0.1, 0.7, 3) / scale, rng.uniform(0, math.pi, 3)
    phase, amplitude = rng.uniform(0, 2 * math.pi, 3), rng.normal(0, 0.15, (3, 3))
    waves = np.stack(
        [np.sin(f * (x * math.cos(t) + y * math.sin(t)) + p) for f, t, p in zip(frequency, angle, phase, strict=True)]
    )
    return np.einsum("kc,khw->chw", amplitude, waves).astype(np.float32)


def _layout(
    rng: np.random.Generator, size: int, glyphs: int, bounds: tuple[float, float]
) -> list[tuple[float, float, float]]:
    """Centres and radii `(cx, cy, r)` from left to right; glyphs keep apart."""
    for _ in range(_ATTEMPTS):
        r = rng.uniform(*bounds, glyphs)
        cx, cy = rng.uniform(r + 1, size - r - 1), rng.uniform(r + 1, size - r - 1)
        order = np.argsort(cx)
        cx, cy, r = cx[order], cy[order], r[order]
        apart = [
            math.hypot(cx[a] - cx[b], cy[a] - cy[b]) > 1.25 * (r[a] + r[b]) and cx[b] - cx[a] >= bounds[1]
            for a in range(glyphs)
            for b in range(a + 1, glyphs)
        ]
        if all(apart):
            return list(zip(cx.tolist(), cy.tolist(), r.tolist(), strict=True))
    raise ValueError(
        f"GlyphField: {glyphs} glyphs of radius {bounds[0]:.1f} to {bounds[1]:.1f} find no place in {size} x {size} "
        "pixels: use fewer or smaller glyphs"
    )


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.6, 1.6, (3, 1)).astype(np.float32)


def _stroke(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    cx, cy = rng.uniform(0, x.shape[0], 2)
    u, v = _unit_coordinates(x - cx, y - cy, rng.uniform(*bounds), rng.uniform(-math.pi / 2, math.pi / 2))
    return (np.abs(u) < 1) & (np.abs(v) < 0.15)


def _unit_coordinates(dx: np.ndarray, dy: np.ndarray, radius: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a glyph's own frame, turned by `angle`, in units of its radius."""
    cosine, sine = math.cos(angle) / radius, math.sin(angle) / radius
    return cosine * dx + sine * dy, cosine * dy - sine * dx


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which pixels a glyph covers, in its unit coordinates."""
    q, m = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    match shape:
        case "disc":
            return q < 1
        case "ring":
            return (q > 0.55) & (q < 1)
        case "square":
            return m < 0.85
        case "frame":
            return (m > 0.5) & (m < 0.9)
        case "triangle":
            return (v < 0.8) & (v > -0.9 + 1.9 * np.abs(u))
        case "plus":
            return (m < 1) & ((np.abs(u) < 0.25) | (np.abs(v) < 0.25))
        case "saltire":
            return (m < 0.95) & ((np.abs(u - v) < 0.33) | (np.abs(u + v) < 0.33))
        case "bar":
            return (np.abs(u) < 1) & (np.abs(v) < 0.3)
    raise ValueError(f"unknown glyph {shape!r}")
