"""ADE20K (the scene parsing benchmark of 150 classes) as it is on disk, and Swin's augmentation for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from core.data import MissingDataError, data_root, load_image, load_labels
from core.data.sources.files import image_files
from core.layers.statistics import IMAGENET_MEAN, IMAGENET_STD
from stvit.losses import IGNORE

_LAYOUT = """\
images/training/ADE_train_00000001.jpg ...      images/validation/ADE_val_00000001.jpg ...
annotations/training/ADE_train_00000001.png ... annotations/validation/ADE_val_00000001.png ..."""

Pair = tuple[Tensor, Tensor]


class ADE20K(Dataset):
    """Pictures with a label per pixel.

    Samples: `image` `(3, H, W)`, `mask` `(h, w)` int64 and `sample_id`, the file's name. In the files label 0 is
    "other" and 1 to 150 are the classes; samples have 0 to 149, and `IGNORE` for the rest (`reduce_zero_label`).

    Args:
        root: folder laid out as the benchmark's archive.
        split: `training` or `validation`.
        transform: from an image and its mask to tensors, see `SegmentationTrain` and `SegmentationEval`.
        reduce_zero_label: as described above; False keeps the numbers in the files.

    Raises:
        MissingDataError: no such folder, or pictures without annotations.
        ValueError: unknown split.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "training",
        transform: Callable[[Pair], tuple[Tensor, Tensor]] | None = None,
        reduce_zero_label: bool = True,
    ) -> None:
        if split not in ("training", "validation"):
            raise ValueError(f"ADE20K has no split {split!r}: use training or validation")
        base = data_root(root, what="ADE20K", layout=_LAYOUT)
        images = data_root(base / "images" / split, what=f"ADE20K {split} images", layout=_LAYOUT)
        self.files = [images / name for name in image_files(images)]
        folder = data_root(base / "annotations" / split, what=f"ADE20K {split} annotations", layout=_LAYOUT)
        masks = {Path(name).stem: folder / name for name in image_files(folder)}
        self.masks = [masks.get(path.stem, folder / f"{path.stem}.png") for path in self.files]
        missing = [path for path in self.masks if path.stem not in masks]
        if missing or not self.files:
            what = (
                f"{len(missing)} pictures have no annotation, first {missing[0]}" if missing else f"{images} is empty"
            )
            raise MissingDataError(f"ADE20K: {what}; expected\n{_LAYOUT}")
        self.transform = SegmentationEval() if transform is None else transform
        self.reduce_zero_label = reduce_zero_label

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.files[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = torch.from_numpy(load_labels(self.masks[index]))
        image = F.pil_to_tensor(load_image(self.files[index], size=(labels.shape[1], labels.shape[0])))
        if labels.shape != image.shape[-2:]:
            raise ValueError(
                f"{self.masks[index]} is {tuple(labels.shape)}, its picture {tuple(image.shape[-2:])}: not a pair"
            )
        if self.reduce_zero_label:
            labels = torch.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        image, mask = self.transform((image, labels))
        return {"image": image, "mask": mask, "sample_id": self.files[index].stem}


class SegmentationTrain:
    """Random scale, crop, mirroring and colours, as Swin's recipe for ADE20K has them.

    Args:
        size: side of the crop.
        scale: smallest and largest factor on a picture whose short side is `size`.
        longest: longest side at factor 1.
        dominance: a crop in which one class covers more than this share is drawn anew (ten times at most).
        flip: probability of mirroring.
        jitter: strength of brightness, contrast, saturation; hue.
    """

    def __init__(
        self,
        size: int = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        longest: int = 2048,
        dominance: float = 0.75,
        flip: float = 0.5,
        jitter: Sequence[float] = (0.125, 0.5, 0.5, 0.07),
    ) -> None:
        self.size, self.scale, self.longest = size, tuple(scale), longest
        self.dominance, self.flip = dominance, flip
        self.jitter = v2.ColorJitter(*jitter)

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """uint8 `(3, H, W)` and int64 `(H, W)` to `(3, size, size)` float32, normalised, and `(size, size)` int64."""
        image, mask = pair
        factor = float(np.random.uniform(*self.scale))
        shape = fitted_size(image.shape[-2:], round(factor * self.size), round(factor * self.longest))
        image = F.resize(image, shape, antialias=True)
        mask = F.resize(mask[None], shape, F.InterpolationMode.NEAREST)
        below, right = (max(self.size - side, 0) for side in shape)
        image = F.pad(image, [0, 0, right, below], fill=[round(255 * m) for m in IMAGENET_MEAN])
        mask = F.pad(mask, [0, 0, right, below], fill=IGNORE)[0]
        image, mask = self._crop(image, mask)
        if np.random.uniform() < self.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        return normalised(self.jitter(image)), mask.contiguous()

    def _crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        height, width = mask.shape
        for _ in range(10):
            top = int(np.random.randint(height - self.size + 1))
            left = int(np.random.randint(width - self.size + 1))
            cut = (..., slice(top, top + self.size), slice(left, left + self.size))
            counts = mask[cut].flatten().bincount(minlength=IGNORE + 1)[:IGNORE]
            if int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < self.dominance:
                break
        return image[cut], mask[cut]


class SegmentationEval:
    """Pictures at the recipe's size, masks as they are.

    Args:
        short: short side of a picture after resizing.
        longest: longest side that it may have.
        divisor: sides are rounded to multiples of it.
        mean: of the channels, in units of [0, 1].
        std: deviation of the channels.
    """

    def __init__(
        self,
        short: int = 512,
        longest: int = 2048,
        divisor: int = 32,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.short, self.longest, self.divisor = short, longest, divisor
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, pair: Pair | Any) -> tuple[Tensor, Tensor] | Tensor:
        """Image `(3, H, W)` float32 normalised and mask `(h, w)` int64; of a PIL image alone the image."""
        if not isinstance(pair, tuple):
            return self.image(F.pil_to_tensor(pair))
        return self.image(pair[0]), pair[1]

    def image(self, image: Tensor) -> Tensor:
        """`(3, H, W)` uint8 resized and normalised."""
        shape = fitted_size(image.shape[-2:], self.short, self.longest)
        shape = [max(1, round(side / self.divisor)) * self.divisor for side in shape]
        return normalised(F.resize(image, shape, antialias=True), self.mean, self.std)


def fitted_size(size: Sequence[int], short: int, longest: int) -> list[int]:
    """(H, W) with that short side, or a smaller one where the long side would exceed `longest`; the aspect stays."""
    factor = min(short / min(size), longest / max(size))
    return [max(1, round(factor * side)) for side in size]


def normalised(image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """uint8 `(3, H, W)` to float32 by the channels' mean and deviation in units of [0, 1]."""
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(mean), list(std))
