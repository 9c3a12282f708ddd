"""Handwritten digits on the background of ShapeGlyphs: real shapes for the same question, from scikit-learn."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from core.data import derive_seed
from seqgan.standin.shape_glyphs import HALF, SHIFT, SIZE, SPLITS, Drawn, ShapeGlyphs, on_background, places

# The first are for training, the rest for the test: they come from other writers.
TRAIN = 1297


@lru_cache(maxsize=1)
def scanned() -> tuple[Tensor, Tensor]:
    """All 1,797 digits `(N, 8, 8)` in [0, 1] and their classes `(N,)`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target, dtype=torch.int64)


def placed(digits: Tensor, cx: Tensor, cy: Tensor, half: Tensor) -> Tensor:
    """Digits `(N, 8, 8)` enlarged to twice `half` pixels about their centres `(N,)`: `(N, 24, 24)` in [0, 1]."""
    grid = torch.arange(SIZE, dtype=torch.float32)
    x = (grid[None, None, :] - cx[:, None, None]) / half[:, None, None]
    y = (grid[None, :, None] - cy[:, None, None]) / half[:, None, None]
    where = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    return F.grid_sample(digits[:, None], where, mode="bilinear", align_corners=False)[:, 0]


@lru_cache(maxsize=4)
def draw_digits(split: str, count: int, seed: int) -> Drawn:
    """`count` images of a seed; digits of a split are drawn with repetition, each at a place and on a background."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    images, labels = scanned()
    first, last = (0, TRAIN) if split == "train" else (TRAIN, len(images))
    rows = torch.randint(first, last, (count,), generator=generator)
    pixels, scaled = places(count, generator)
    return Drawn(on_background(placed(images[rows], *pixels.unbind(1)), generator), labels[rows], scaled)


class ShapeDigits(ShapeGlyphs):
    """As `ShapeGlyphs`, with faint handwritten digits in place of the shapes."""

    classes = tuple("0123456789")
    local_contrast = True  # grey strokes drown in the background otherwise: half of the real images are then misread

    def draw(self) -> Drawn:
        """All images of the split; drawn once."""
        return draw_digits(self.split, self.count, derive_seed(self.seed, SPLITS[self.split][0]))

    def templates(self) -> tuple[Tensor, Tensor]:
        """Six mean digits of each class, of training digits, at 5 x 5 centres in 3 sizes, and their classes."""
        from sklearn.cluster import KMeans

        images, labels = scanned()
        means, kinds = [], []
        for kind in range(len(self.classes)):
            own = images[:TRAIN][labels[:TRAIN] == kind]
            fitted = KMeans(6, n_init=1, random_state=0).fit(own.flatten(1).numpy())
            means.append(torch.tensor(fitted.cluster_centers_, dtype=torch.float32).view(-1, 8, 8))
            kinds += [kind] * 6
        every = torch.cat(means)
        centres = SIZE / 2 + torch.linspace(-SHIFT, SHIFT, 5)
        cx, cy, half = (g.flatten() for g in torch.meshgrid(centres, centres, torch.linspace(*HALF, 3), indexing="ij"))
        number, repeat = len(cx), len(every)
        figures = placed(
            every.repeat_interleave(number, dim=0), cx.repeat(repeat), cy.repeat(repeat), half.repeat(repeat)
        )
        return figures, torch.tensor(kinds).repeat_interleave(number)
