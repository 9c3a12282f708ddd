"""MovingGlyphs: small clips in which a shape moves; made by numpy, in memory or as video files.

A glyph crosses a torus: what leaves the picture on one side enters on the other. So every frame by itself has the same
distribution whatever the direction, and only the order of frames tells it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stvit.standin.glyphs import GLYPHS, _colour, _gratings, _inside, _unit_coordinates, to_pixels

#: Directions of motion, (x, y) with y down; class = direction * shapes + shape.
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}
#: Mean and deviation of the pixels in [0, 1].
GLYPHS_MEAN, GLYPHS_STD = 0.35, 0.15
# Streams of random numbers, apart from those of other data sets made here.
_STREAMS = {"train": (2000, 2048), "val": (2001, 512), "test": (2002, 512)}


class MovingGlyphs(Dataset):
    """Clips of a glyph that moves in one of four directions; the class is direction x shape.

    A sample is a function of the seed, the split and its number alone, whatever `count`.

    Samples: `video` `(3, frames, size, size)` float32, normalised; `label` int; `sample_id`.

    Args:
        split: `train`, `val` or `test`.
        size: side of the frames in pixels; lengths below are at 28 pixels and grow with it.
        frames: frames of a clip.
        count: number of clips; None for 2048 (train) or 512.
        shapes: number of shapes, the first ones of `stvit.standin.glyphs.GLYPHS`.
        radius: smallest and largest radius of a glyph.
        speed: smallest and largest speed, in pixels per frame.
        noise: deviation of the noise that every frame has by itself, in units of the colours.
        seed: of all clips.

    Raises:
        ValueError: unknown split, or numbers that make no clip.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 28,
        frames: int = 8,
        count: int | None = None,
        shapes: int = 4,
        radius: tuple[float, float] = (4.5, 7.0),
        speed: tuple[float, float] = (1.0, 2.0),
        noise: float = 0.15,
        seed: int = 0,
    ) -> None:
        if split not in _STREAMS:
            raise ValueError(f"MovingGlyphs has no split {split!r}: use {', '.join(_STREAMS)}")
        if not 1 <= shapes <= len(GLYPHS) or min(size, frames) < 1:
            raise ValueError(
                f"MovingGlyphs(size={size}, frames={frames}, shapes={shapes}): size and frames are at least 1, shapes "
                f"1 to {len(GLYPHS)}"
            )
        self.split, self.seed = split, seed
        self.classes = class_names(shapes)
        self.clips, self.labels = _clips(
            split,
            seed,
            _STREAMS[split][1] if count is None else count,
            size,
            frames,
            shapes,
            (float(radius[0]), float(radius[1])),
            (float(speed[0]), float(speed[1])),
            float(noise),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "video": normalised(self.clips[index]),
            "label": int(self.labels[index]),
            "sample_id": f"moving-{self.split}-{self.seed}-{int(index)}",
        }


def class_names(shapes: int) -> tuple[str, ...]:
    """Names of the classes, in their order: `disc right`, `ring right`, ..."""
    return tuple(f"{shape} {direction}" for direction in DIRECTIONS for shape in GLYPHS[:shapes])


def normalised(clip: np.ndarray) -> Tensor:
    """uint8 `(T, H, W, 3)` to float32 `(3, T, H, W)`."""
    return (torch.tensor(clip).permute(3, 0, 1, 2).float() / 255 - GLYPHS_MEAN) / GLYPHS_STD


def sample_clip(
    split: str,
    seed: int,
    index: int,
    *,
    size: int = 28,
    frames: int = 8,
    shapes: int = 4,
    radius: tuple[float, float] = (4.5, 7.0),
    speed: tuple[float, float] = (1.0, 2.0),
    noise: float = 0.15,
) -> tuple[np.ndarray, int]:
    """Sample `index` of a split: frames uint8 `(frames, size, size, 3)` and class. See `MovingGlyphs`."""
    rng, label = _stream(split, seed, index, shapes)
    direction, shape = list(DIRECTIONS.values())[label // shapes], GLYPHS[label % shapes]
    scale = size / 28
    y, x = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32), indexing="ij")
    background, colour = _gratings(rng, x, y, scale), _colour(rng)
    start, angle = rng.uniform(0, size, 2), rng.uniform(-0.35, 0.35)
    r, step = scale * rng.uniform(*radius), scale * rng.uniform(*speed)
    clip = np.empty((frames, 3, size, size), np.float32)
    for frame in range(frames):
        centre = start + step * frame * np.array(direction)
        # Offsets on the torus: the nearest copy of the centre counts.
        dx, dy = ((axis - c + size / 2) % size - size / 2 for axis, c in zip((x, y), centre, strict=True))
        clip[frame] = background
        clip[frame][:, _inside(shape, *_unit_coordinates(dx, dy, r, angle))] = colour
    clip += noise * rng.standard_normal(clip.shape, dtype=np.float32)
    return to_pixels(clip.transpose(0, 2, 3, 1)), label


def sample_label(split: str, seed: int, index: int, shapes: int = 4) -> int:
    """The class of a sample, without making its frames."""
    return _stream(split, seed, index, shapes)[1]


def _stream(split: str, seed: int, index: int, shapes: int) -> tuple[np.random.Generator, int]:
    """The random numbers of a sample, and the first of them, its class."""
    rng = np.random.default_rng([seed, _STREAMS[split][0], index])
    return rng, int(rng.integers(len(DIRECTIONS) * shapes))


@lru_cache(maxsize=8)
def _clips(
    split: str,
    seed: int,
    count: int,
    size: int,
    frames: int,
    shapes: int,
    radius: tuple[float, float],
    speed: tuple[float, float],
    noise: float,
) -> tuple[np.ndarray, np.ndarray]:
    """All clips `(count, frames, size, size, 3)` uint8 and classes `(count,)`."""
    clips = np.empty((count, frames, size, size, 3), np.uint8)
    labels = np.empty(count, np.int64)
    options = dict(size=size, frames=frames, shapes=shapes, radius=radius, speed=speed, noise=noise)
    for index in range(count):
        clips[index], labels[index] = sample_clip(split, seed, index, **options)
    for array in (clips, labels):
        array.flags.writeable = False  # shared by all data sets with these settings
    return clips, labels
