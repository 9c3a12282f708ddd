"""Cue swap: drawn images in which another colour says what matters than in pre-training; the stand-in of the claim.

Two objects stand on a ground, and the label is the place of one of them. In the source, its first colour is positive
and the other's negative, while second colours are free. In the target the colours have changed their parts. A network
that knows places and both colours has to learn one thing anew, which few of its channels carry: the paper's premise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from core.data import derive_seed

SIZE, CELLS = 32, 3
CELL = SIZE / CELLS
SHAPES = ("disc", "square", "triangle", "cross")
HALF = (3.0, 4.4)  # half sizes in pixels: small and large
# What the source network is taught: five factors of the object that matters, then second colours of both objects.
FACTORS = {
    "place": CELLS * CELLS,
    "shape": len(SHAPES),
    "size": 2,
    "tone": 2,
    "fill": 2,
    "colour": 2,
    "other_colour": 2,
}
# Streams of random numbers, and images by default.
SPLITS = {
    ("source", "train"): (0, 16000),
    ("source", "test"): (1, 1000),
    ("target", "train"): (2, 300),
    ("target", "test"): (3, 1000),
}


class Drawn(NamedTuple):
    """Drawn images.

    image: `(N, 3, 32, 32)`; the planes are brightness, first and second colour.
    factors: `(N, 7)` int64, in the order of `FACTORS`; the first is the label.
    """

    image: Tensor
    factors: Tensor


def masks(shape: Tensor, half: Tensor, hollow: Tensor, centre: Tensor) -> Tensor:
    """Where objects are, `(N, 32, 32)` in [0, 1], with edges of one pixel.

    Args:
        shape: indices of `SHAPES` `(N,)`.
        half: half sizes in pixels `(N,)`.
        hollow: whether the middle is open, `(N,)` bool.
        centre: x and y in pixels `(N, 2)`.
    """
    grid = torch.arange(SIZE) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    size = half[:, None, None]
    most, least = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    distances = torch.stack(  # how far outside, in pixels
        [
            torch.hypot(x, y) - size,
            most - 0.9 * size,
            torch.maximum((2 * x.abs() + y) / 5**0.5 - 0.45 * size, -y - size),
            torch.maximum(least - 0.35 * size, most - size),
        ]
    )
    outside = distances[shape, torch.arange(len(shape))]
    solid = (0.5 - outside).clamp(0, 1)
    hole = (0.5 - (torch.hypot(x, y) - 0.45 * size)).clamp(0, 1)
    return torch.where(hollow[:, None, None], solid * (1 - hole), solid)


@lru_cache(maxsize=4)
def draw(domain: str, count: int, seed: int) -> Drawn:
    """`count` images of a domain and a seed."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    parts = []
    for start in range(0, count, 2000):
        parts.append(_draw(domain, min(2000, count - start), generator))
    return Drawn(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _draw(domain: str, count: int, generator: torch.Generator) -> Drawn:
    def whole(high: int) -> Tensor:
        return torch.randint(high, (count, 2), generator=generator)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 2, generator=generator)

    # The first of two objects matters.
    place = torch.rand(count, CELLS * CELLS, generator=generator).argsort(1)[:, :2]
    shape, size, tone, fill, free = whole(len(SHAPES)), whole(2), whole(2), whole(2), whole(2)
    cue = torch.tensor([1, 0]).expand(count, 2)
    first, second = (cue, free) if domain == "source" else (free, cue)
    centre = torch.stack([place % CELLS, place // CELLS], dim=-1) * CELL + CELL / 2
    centre = centre + (torch.rand(count, 2, 2, generator=generator) - 0.5) * 3
    half = torch.tensor(HALF)[size]
    planes = torch.stack(
        [
            (2 * tone - 1) * between(0.5, 0.9),
            (2 * first - 1) * between(0.4, 0.8),
            (2 * second - 1) * between(0.4, 0.8),
        ],
        dim=1,
    )  # (N, 3, 2)
    image = _ground(count, generator)
    for index in range(2):
        mask = masks(shape[:, index], half[:, index], fill[:, index] == 1, centre[:, index])[:, None]
        image = image + mask * (planes[:, :, index, None, None] - image)
    if domain == "target":
        image = 0.6 * image
        image[:, 0] += 0.25
        image = image + 0.12 * torch.randn(image.shape, generator=generator)
    image = image + 0.04 * torch.randn(image.shape, generator=generator)
    factors = [place[:, 0], shape[:, 0], size[:, 0], tone[:, 0], fill[:, 0], second[:, 0], second[:, 1]]
    return Drawn(image, torch.stack(factors, dim=1))


def _ground(count: int, generator: torch.Generator) -> Tensor:
    """Grounds of slowly varying brightness without colour, `(N, 3, 32, 32)`."""
    ground = torch.zeros(count, 3, SIZE, SIZE)
    field = 0.15 * torch.randn(count, 1, 4, 4, generator=generator)
    ground[:, :1] = F.interpolate(field, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return ground


def to_rgb(image: Tensor) -> Tensor:
    """Images as one sees them, `(..., 3, H, W)` in [0, 1].

    The first colour runs from green to magenta, the second one from blue to yellow.
    """
    brightness, first, second = image.unbind(-3)
    axes = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]], dtype=image.dtype)
    colour = first.unsqueeze(-3) * axes[0][:, None, None] + second.unsqueeze(-3) * axes[1][:, None, None]
    return (0.5 + 0.3 * brightness.unsqueeze(-3) + 0.25 * colour).clamp(0, 1)


class CueSwap(Dataset):
    """Images of a split as samples: `image` `(3, 32, 32)`, `label` (a place), `factors` `(7,)` and `sample_id`.

    Args:
        domain: `source`, where the first colour says which object matters, or `target`, where the second does.
        split: `train` (16,000 images of the source, 300 of the target) or `test` (1,000).
        seed: of all images; domains and splits have streams of their own.
        count: number of images.

    Raises:
        ValueError: an unknown domain or split, or no images.
    """

    classes = tuple(f"row {i // CELLS}, column {i % CELLS}" for i in range(CELLS * CELLS))

    def __init__(self, domain: str = "target", split: str = "train", seed: int = 0, count: int | None = None) -> None:
        if (domain, split) not in SPLITS:
            known = ", ".join("/".join(key) for key in SPLITS)
            raise ValueError(f"CueSwap has no {domain}/{split}: use {known}")
        self.domain, self.split, self.seed = domain, split, seed
        self.count = SPLITS[domain, split][1] if count is None else count
        if self.count < 1:
            raise ValueError(f"CueSwap: count is at least 1, not {count}")

    @property
    def drawn(self) -> Drawn:
        """All images at once; not to be written to, as data sets with these settings share them."""
        return draw(self.domain, self.count, derive_seed(self.seed, SPLITS[self.domain, self.split][0]))

    def origin(self) -> dict[str, Any]:
        """What a file of chosen channels keeps about the data."""
        return {"type": "CueSwap", "domain": self.domain, "split": self.split, "seed": self.seed, "count": self.count}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, drawn = int(index), self.drawn
        return {
            "image": drawn.image[index].clone(),
            "label": int(drawn.factors[index, 0]),
            "factors": drawn.factors[index].clone(),
            "sample_id": f"{self.domain}-{self.split}-{self.seed}-{index}",
        }
