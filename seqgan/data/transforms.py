"""Pictures to tensors in [-1, 1], as tokenizers are trained (section 4 of the recipe)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from core.data import to_pil

CROPS = ("random", "centre", "scaled")


@dataclass
class TokenizerTransform:
    """Shorter side to `size`, a square crop, perhaps mirrored: `(3, size, size)` float32 in [-1, 1].

    size           side of the crop, and of the shorter side before it
    crop           `random` place; `centre`; `scaled`: a random square whose side is a share of the shorter one
    scale          range of that share, for `scaled` (MaskGIT's tokenizer: 0.8 to 1)
    flip           probability of a mirrored picture
    interpolation  "bilinear", "bicubic", "lanczos", "box"; PIL resizes and antialiases
    """

    size: int = 256
    crop: str = "random"
    scale: tuple[float, float] = (0.8, 1.0)
    flip: float = 0.5
    interpolation: str = "bilinear"
    _shrink: Callable[[Any], Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.scale = (float(self.scale[0]), float(self.scale[1]))
        if self.crop not in CROPS:
            raise ValueError(f"unknown crop {self.crop!r}: use {', '.join(CROPS)}")
        if self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 <= self.flip <= 1:
            raise ValueError(
                f"size {self.size} must be positive, scale {self.scale} rise within (0, 1] and flip {self.flip} be a "
                "probability"
            )
        self._shrink = v2.Resize(self.size, interpolation=v2.InterpolationMode(self.interpolation))

    def __call__(self, image: Any) -> Tensor:
        """The tensor of a picture of any mode; random numbers are torch's."""
        picture = to_pil(image)
        if self.crop == "scaled":
            side = max(1, round(min(picture.size) * (self.scale[0] + (self.scale[1] - self.scale[0]) * _draw())))
            picture = v2.functional.crop(picture, *self._place(picture.size, side), side, side)
        picture = self._shrink(picture)
        picture = v2.functional.crop(picture, *self._place(picture.size, self.size), self.size, self.size)
        if self.flip and _draw() < self.flip:
            picture = v2.functional.hflip(picture)
        return v2.functional.pil_to_tensor(picture).float() / 127.5 - 1

    def _place(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """Top and left of a crop of a picture of `size` (width, height)."""
        free = size[1] - side, size[0] - side
        if self.crop == "centre":
            return round(free[0] / 2), round(free[1] / 2)
        return int(torch.randint(free[0] + 1, ())), int(torch.randint(free[1] + 1, ()))


def _draw() -> float:
    return float(torch.rand(()))
