"""The drawn world: one object on a flat background, named by three words that each cover several looks.

A caption leaves the picture open on purpose. "warm" is one of three hues, "ball" a disc or a ring: a sampler that draws
every frame by itself has to choose anew in every frame, and can be caught disagreeing exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 16
COLOURS = ("warm", "cool", "pinkish")
SHAPES = ("ball", "bar")
BACKGROUNDS = ("night", "stone", "snow")
#: Looks per head in the order of the words: hues, disc ring upright flat, background tints.
LOOKS = (9, 4, 9)

_HUES = torch.tensor([0.0, 0.08, 0.16, 0.36, 0.50, 0.63, 0.74, 0.83, 0.92])
_LEVELS = torch.tensor([0.12, 0.50, 0.88])
_TINTS = torch.tensor([[0.08, -0.02, -0.06], [-0.06, 0.06, -0.02], [-0.04, -0.02, 0.08]])
_WORD_SIZES = torch.tensor([3, 2, 3])  # looks that a word covers
_WALLS = (4.0, 12.0)  # a moving object's centre turns back here
PATHS = ("straight", "curved")


class Words(NamedTuple):
    """Indices of a caption's words: into `COLOURS`, `SHAPES` and `BACKGROUNDS`."""

    colour: int
    shape: int
    background: int

    @property
    def caption(self) -> str:
        """The sentence."""
        return f"a {COLOURS[self.colour]} {SHAPES[self.shape]} moves in the {BACKGROUNDS[self.background]}"


class Edit(NamedTuple):
    """One of a clip's edits: the part that changes, and the words asked for."""

    kind: str
    words: Words

    @property
    def prompt(self) -> str:
        """The caption of the edited clip."""
        return self.words.caption


class Clip(NamedTuple):
    """A drawn clip.

    video    (f, 3, 16, 16) float32; -1 to 1 and a little beyond: the pixel noise is not clipped
    words    of its caption
    looks    (3,) int64, the look of every head
    centres  (f, 2) float32, x and y of the object in pixels; the picture's left upper corner is (0, 0)
    masks    (f, 16, 16) bool, whatever pixel the object touches
    """

    video: Tensor
    words: Words
    looks: Tensor
    centres: Tensor
    masks: Tensor

    @property
    def caption(self) -> str:
        """The source caption."""
        return self.words.caption


def all_words() -> list[Words]:
    """The 18 captions' words; a caption's number is its place here."""
    return [Words(c, s, b) for c in range(len(COLOURS)) for s in range(len(SHAPES)) for b in range(len(BACKGROUNDS))]


def captions() -> list[str]:
    """The 18 captions."""
    return [words.caption for words in all_words()]


def parse_caption(caption: str) -> Words:
    """The words of a caption.

    Raises:
        ValueError: no caption of this world.
    """
    known = {words.caption: words for words in all_words()}
    if caption not in known:
        raise ValueError(f"{caption!r} is no caption of the drawn world, which are like {next(iter(known))!r}")
    return known[caption]


def words_of_looks(looks: Tensor) -> Tensor:
    """The word that every look belongs to: (..., 3) int64 to (..., 3)."""
    return torch.div(looks, _WORD_SIZES.to(looks.device), rounding_mode="floor")


def caption_numbers(looks: Tensor) -> Tensor:
    """The number of the caption of pictures with these looks: (B, 3) to (B,)."""
    colour, shape, background = words_of_looks(looks).unbind(-1)
    return (colour * len(SHAPES) + shape) * len(BACKGROUNDS) + background


# ---------------------------------------------------------------------- drawing
def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours (B,) x 3, hue in turns, to (B, 3) in [0, 1]."""
    place = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(place, 4 - place).clamp(0, 1))


def paint(looks: Tensor, colour: Tensor, background: Tensor, radius: Tensor, centres: Tensor) -> Tensor:
    """Pictures without noise.

    Args:
        looks: (B, 3) int64; only the shape's matters here.
        colour: of the object, (B, 3) in [0, 1].
        background: (B, 3) in [0, 1].
        radius: in pixels, (B,).
        centres: x and y in pixels, (B, 2).

    Returns:
        (B, 3, 16, 16) in [0, 1].
    """
    covered = coverage(looks, radius, centres)[:, None]
    return covered * colour[:, :, None, None] + (1 - covered) * background[:, :, None, None]


def coverage(looks: Tensor, radius: Tensor, centres: Tensor) -> Tensor:
    """How much of every pixel the object covers, (B, 16, 16) in [0, 1]; arguments as of `paint`."""
    grid = torch.arange(SIZE) + 0.5
    dx = grid[None, None, :] - centres[:, 0, None, None]
    dy = grid[None, :, None] - centres[:, 1, None, None]
    r = radius[:, None, None]
    distance = (dx.square() + dy.square()).sqrt()
    disc = r - distance
    ring = torch.minimum(disc, distance - r / 2)
    upright = torch.minimum(0.5 * r - dx.abs(), 1.35 * r - dy.abs())
    flat = torch.minimum(1.35 * r - dx.abs(), 0.5 * r - dy.abs())
    inside = torch.stack([disc, ring, upright, flat], dim=1)[torch.arange(len(looks)), looks[:, 1]]
    return (inside + 0.5).clamp(0, 1)


def draw_looks(count: int, generator: torch.Generator, words: Words | None = None) -> Tensor:
    """Looks drawn uniformly, (count, 3) int64; with `words` among those that the words cover."""
    if words is None:
        return torch.stack([torch.randint(n, (count,), generator=generator) for n in LOOKS], dim=1)
    parts = [
        word * size + torch.randint(size, (count,), generator=generator)
        for word, size in zip(words, _WORD_SIZES.tolist(), strict=True)
    ]
    return torch.stack(parts, dim=1)


def draw_shades(looks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Colours of objects and backgrounds with these looks, each (B, 3) in [0, 1]: a look leaves a little room."""
    count = len(looks)
    hue = _HUES[looks[:, 0]] + 0.012 * (2 * torch.rand(count, generator=generator) - 1)
    saturation, value = 0.85 + 0.15 * torch.rand(2, count, generator=generator)
    offset = 0.04 * torch.rand(count, 1, generator=generator) - 0.02
    level, tint = torch.div(looks[:, 2], 3, rounding_mode="floor"), looks[:, 2] % 3
    background = (_LEVELS[level][:, None] + _TINTS[tint] + offset).clamp(0, 1)
    return hsv_to_rgb(hue, saturation, value), background


def draw_pictures(count: int, generator: torch.Generator, words: Words | None = None) -> tuple[Tensor, Tensor]:
    """Single pictures for training.

    Args:
        count: B.
        generator: of everything about them.
        words: of all captions; None: looks are drawn uniformly.

    Returns:
        Pictures (B, 3, 16, 16), about -1 to 1, and their looks (B, 3) int64.
    """
    looks = draw_looks(count, generator, words)
    colour, background = draw_shades(looks, generator)
    radius = 2.8 + 0.8 * torch.rand(count, generator=generator)
    centres = 3.5 + 9 * torch.rand(count, 2, generator=generator)
    noise = 0.04 * torch.rand(count, 1, 1, 1, generator=generator)
    pictures = paint(looks, colour, background, radius, centres)
    pictures = pictures + noise * torch.randn(pictures.shape, generator=generator)
    return 2 * pictures - 1, looks


# ---------------------------------------------------------------------- clips
def draw_clip(seed: int, frames: int = 8, path: str = "straight") -> Clip:
    """The clip of a seed: one look, one shade, an object on its path between walls.

    Args:
        seed: of the clip.
        frames: f; a longer clip of a seed takes the same path and goes on.
        path: `straight`, which turns back at walls, 2 to 3 pixels a frame, the object's size the same; or `curved`, a
            Lissajous figure, whose speed changes as the object's size does.

    Raises:
        ValueError: less than one frame, or another path.
    """
    if frames < 1:
        raise ValueError(f"a clip of {frames} frames: at least 1")
    if path not in PATHS:
        raise ValueError(f"path={path!r}: use {', '.join(PATHS)}")
    generator = torch.Generator().manual_seed(7000 + seed)
    looks = draw_looks(1, generator)
    colour, background = draw_shades(looks, generator)
    radius = 3 + 0.4 * torch.rand(1, generator=generator)
    time = torch.arange(frames)
    if path == "straight":
        start = 4 + 8 * torch.rand(2, generator=generator)
        angle = 2 * math.pi * torch.rand(1, generator=generator)
        speed = 2 + torch.rand(1, generator=generator)
        step = speed * torch.cat([angle.cos(), angle.sin()])
        centres = reflect(start + time[:, None] * step, *_WALLS)
        radius = radius.expand(frames)
    else:
        # Sines of x, y and size, 9 to 18 frames to a round: x and y reach 1.4 to 2.8 pixels a frame.
        phase = 2 * math.pi * torch.rand(3, generator=generator)
        rounds = 9 + 9 * torch.rand(3, generator=generator)
        wave = (phase + 2 * math.pi * time[:, None] / rounds).sin()
        centres = sum(_WALLS) / 2 + (_WALLS[1] - _WALLS[0]) / 2 * wave[:, :2]
        radius = radius + 0.4 * wave[:, 2]  # 2.6 to 3.8, and 2.8 to 3.6 in training
    covered = coverage(looks.expand(frames, 3), radius, centres)
    still = paint(*(t.expand(frames, *t.shape[1:]) for t in (looks, colour, background)), radius, centres)
    video = still + 0.04 * torch.randn(still.shape, generator=generator)
    words = Words(*words_of_looks(looks)[0].tolist())
    return Clip(2 * video - 1, words, looks[0], centres, covered > 0)


def reflect(place: Tensor, low: float, high: float) -> Tensor:
    """Where something that moves on straight between two walls is, any shape."""
    width = high - low
    phase = (place - low) % (2 * width)
    return low + torch.minimum(phase, 2 * width - phase)


def edits(source: Words) -> list[Edit]:
    """The eight edits of a clip, by rule: from one word to all three, cyclic within each list of words."""
    changes = {
        "colour +1": (1, 0, 0),
        "colour +2": (2, 0, 0),
        "shape": (0, 1, 0),
        "background +1": (0, 0, 1),
        "background +2": (0, 0, 2),
        "colour +1, shape": (1, 1, 0),
        "colour +2, background +1": (2, 0, 1),
        "colour +2, shape, background +2": (2, 1, 2),
    }
    counts = (len(COLOURS), len(SHAPES), len(BACKGROUNDS))
    return [
        Edit(kind, Words(*((word + k) % n for word, k, n in zip(source, shift, counts, strict=True))))
        for kind, shift in changes.items()
    ]
