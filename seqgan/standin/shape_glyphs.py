"""ShapeGlyphs: ten faint shapes before a loud background, drawn instead of downloaded; the stand-in of the claim.

The class is a shape of little contrast. The background is a field of about one independent colour per code, which
costs many bits and says nothing about the class: a budget of codes is spent on one or on the other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from core.data import derive_seed

SIZE = 24
CLASSES = ("disc", "ring", "square", "cross", "triangle", "star", "bar", "post", "corner", "checker")
SHIFT, HALF = 2.5, (5.5, 7.5)  # of centres about the middle, and the range of half sizes, in pixels
# Streams of random numbers, and the number of images by default.
SPLITS = {"train": (0, 12000), "test": (1, 2000)}


class Drawn(NamedTuple):
    """Drawn images.

    image: `(N, 3, 24, 24)` in [-1, 1].
    label: `(N,)` int64.
    place: centre x and y and half size, `(N, 3)`, each scaled to [-1, 1].
    """

    image: Tensor
    label: Tensor
    place: Tensor


def shape_masks(cx: Tensor, cy: Tensor, half: Tensor) -> Tensor:
    """Where each of the ten shapes is, `(N, 10, 24, 24)` bool, of centres and half sizes `(N,)` in pixels."""
    grid = torch.arange(SIZE, dtype=torch.float32)
    x = (grid[None, None, :] - cx[:, None, None]) / half[:, None, None]
    y = (grid[None, :, None] - cy[:, None, None]) / half[:, None, None]
    x, y = torch.broadcast_tensors(x, y)
    radius = torch.hypot(x, y)
    most, least = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    checks = (torch.floor(2 * x) + torch.floor(2 * y)) % 2 == 0
    shapes = [
        radius < 1,
        (radius > 0.55) & (radius < 1),
        most < 0.9,
        (least < 0.3) & (most < 1),
        (y > -0.8) & (y < 0.9) & (x.abs() < (0.9 - y) / 2),
        radius < 0.55 + 0.45 * torch.cos(5 * torch.atan2(y, x)),
        (y.abs() < 0.3) & (x.abs() < 1.2),
        (x.abs() < 0.3) & (y.abs() < 1.2),
        ((x < -0.4) | (y > 0.4)) & (most < 1),
        checks & (most < 1),
    ]
    return torch.stack(shapes, dim=1)


def places(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres and half sizes in pixels `(N, 3)`, and the same scaled to [-1, 1]."""
    scaled = torch.rand(count, 3, generator=generator) * 2 - 1
    centre = SIZE / 2 + SHIFT * scaled[:, :2]
    half = (HALF[0] + HALF[1]) / 2 + (HALF[1] - HALF[0]) / 2 * scaled[:, 2:]
    return torch.cat([centre, half], dim=1), scaled


def on_background(figure: Tensor, generator: torch.Generator) -> Tensor:
    """Images `(N, 3, 24, 24)` in [-1, 1] of figures `(N, 24, 24)` in [0, 1], always brighter than what is behind."""
    count = len(figure)
    base = 0.3 + 0.4 * torch.rand(count, 3, 1, 1, generator=generator)
    field = 0.2 * torch.randn(count, 3, 6, 6, generator=generator)
    field = F.interpolate(field, (SIZE, SIZE), mode="bilinear", align_corners=False)
    noise = torch.randn(count, 3, SIZE + 2, SIZE + 2, generator=generator)
    noise = 0.09 * F.avg_pool2d(noise, 3, 1)  # a mean of nine has a third of the deviation
    image = base + field + 0.25 * figure[:, None] + noise
    return image.clamp(0, 1) * 2 - 1


@lru_cache(maxsize=4)
def draw_glyphs(count: int, seed: int) -> Drawn:
    """`count` images of a seed."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    parts = []
    for start in range(0, count, 2000):  # the masks of all ten shapes at once would take much memory
        n = min(2000, count - start)
        label = torch.randint(len(CLASSES), (n,), generator=generator)
        pixels, scaled = places(n, generator)
        figure = shape_masks(*pixels.unbind(1))[torch.arange(n), label].float()
        parts.append(Drawn(on_background(figure, generator), label, scaled))
    return Drawn(*(torch.cat(part) for part in zip(*parts, strict=True)))


class ShapeGlyphs(Dataset):
    """Images of a split as samples: `image` `(3, 24, 24)` in [-1, 1], `label`, `sample_id` and `asked`.

    `asked` is the class that a sample made in this image's place should have: all classes in turn, equally often.

    Args:
        split: `train` (12,000 images by default) or `test` (2,000).
        seed: of all images; splits have streams of their own.
        count: number of images.

    Raises:
        ValueError: an unknown split, or no images.
    """

    classes = CLASSES
    local_contrast = False  # whether the judge without a network compares images less their local mean

    def __init__(self, split: str = "train", seed: int = 0, count: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"{type(self).__name__} has no split {split!r}: use {', '.join(SPLITS)}")
        self.split, self.seed, self.count = split, seed, SPLITS[split][1] if count is None else count
        if self.count < 1:
            raise ValueError(f"{type(self).__name__}: count is at least 1, not {count}")

    def draw(self) -> Drawn:
        """All images of the split; drawn once."""
        return draw_glyphs(self.count, derive_seed(self.seed, SPLITS[self.split][0]))

    @property
    def drawn(self) -> Drawn:
        """All images at once; not to be written to, as data sets with these settings share them."""
        return self.draw()

    def templates(self) -> tuple[Tensor, Tensor]:
        """What a judge without a network compares with: shapes `(T, 24, 24)` and their classes `(T,)`.

        All ten shapes at 9 x 9 centres in 4 sizes.
        """
        centres = SIZE / 2 + torch.linspace(-SHIFT, SHIFT, 9)
        cx, cy, half = torch.meshgrid(centres, centres, torch.linspace(*HALF, 4), indexing="ij")
        masks = shape_masks(cx.flatten(), cy.flatten(), half.flatten())
        return masks.flatten(0, 1).float(), torch.arange(masks.shape[1]).repeat(len(masks))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, drawn = int(index), self.drawn
        return {
            "image": drawn.image[index].clone(),
            "label": int(drawn.label[index]),
            "asked": index % len(self.classes),
            "sample_id": f"{self.split}-{self.seed}-{index}",
        }
