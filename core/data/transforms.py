"""Image transforms for classification, from a PIL image (or a uint8 array or tensor) to a normalised float tensor.

Both are dataclasses, so a config names them (``transform: {type: core.data.EvalTransform, size: 224}``) and their repr
says everything that they do, which is what a cache's provenance needs.

Images that travel with boxes or masks need nothing of ours: torchvision's v2 transforms move them together when the
sample holds tv_tensors, and :class:`core.data.Collate` knows them::

    transform:
      type: torchvision.transforms.v2.Compose
      transforms:
        - {type: torchvision.transforms.v2.RandomHorizontalFlip}
        - {type: torchvision.transforms.v2.Resize, size: [128, 128]}

    sample = {"image": tv_tensors.Image(...), "boxes": tv_tensors.BoundingBoxes(...), "masks": tv_tensors.Mask(...)}
    sample = transform(sample)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import v2

from core.data.sources.images import to_pil
from core.layers.statistics import IMAGENET_MEAN, IMAGENET_STD

_INTERPOLATION = {mode.value: mode for mode in v2.InterpolationMode}


def _mode(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise ValueError(f"mean and std need one value (grey) or three (RGB) each, not {len(mean)} and {len(std)}")
    return "RGB" if len(mean) == 3 else "L"


@dataclass
class EvalTransform:
    """Resize the shorter side, crop the centre, normalise: (C, size, size) float32.

    The 8-bit image is resized by PIL, and rounded to 8 bits by it, as the recipes of the field are; resizing a float
    tensor gives other pixels.

    size           side of the crop
    resize         shorter side before it; default int(256 / 224 * size), the crop ratio 0.875 of ImageNet evaluation
    interpolation  "bicubic", "bilinear", "lanczos", "nearest"
    mean, std      in units of [0, 1]; one value each makes a grey image of one channel
    """

    size: int = 224
    resize: int | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    _pipeline: Callable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATION:
            raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATION)}, not {self.interpolation!r}")
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        self.resize = self.resize or int(256 / 224 * self.size)
        self._mode = _mode(self.mean, self.std)
        self._pipeline = v2.Compose(
            [
                v2.Resize(self.resize, interpolation=_INTERPOLATION[self.interpolation]),
                v2.CenterCrop(self.size),
                _to_float(),
                v2.Normalize(self.mean, self.std),
            ]
        )

    def __call__(self, image: Any) -> Tensor:
        return self._pipeline(to_pil(image, self._mode))


@dataclass
class TrainTransform:
    """The augmentation of DeiT and Swin (timm's): crop, flip, RandAugment or colour jitter, erasing: (C, size, size).

    size           side of the crop
    crop           "resized": a random part of the area, stretched to size; "padded": a random crop of the image after
                   padding it, for images that have their size already (Swin's rule for 32 pixels and less)
    scale, ratio   area and aspect ratio of a resized crop
    padding        pixels on each side of a padded crop
    flip           probability of a horizontal flip
    auto_augment   timm's policy string; None or "" for none
    color_jitter   strength; only used without auto_augment, which replaces it
    erasing        probability of erasing a rectangle
    erasing_mode   "pixel": noise per pixel, "rand": one random colour, "const": zeros (the mean)
    interpolation  "bicubic", "bilinear", "random", ...
    mean, std      in units of [0, 1]; one value each makes a grey image of one channel
    """

    size: int = 224
    crop: Literal["resized", "padded"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: float = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float | None = 0.4
    erasing: float = 0.25
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    _pipeline: Callable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.crop not in ("resized", "padded"):
            raise ValueError(f"crop must be 'resized' or 'padded', not {self.crop!r}")
        for name in ("scale", "ratio", "mean", "std"):
            setattr(self, name, tuple(getattr(self, name)))
        self._mode = _mode(self.mean, self.std)
        self._pipeline = create_transform(
            input_size=self.size,
            is_training=True,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.flip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment or None,
            interpolation=self.interpolation,
            re_prob=self.erasing,
            re_mode=self.erasing_mode,
            mean=self.mean,
            std=self.std,
        )
        if self.crop == "padded":
            steps = self._pipeline.transforms
            crops = [i for i, step in enumerate(steps) if isinstance(step, RandomResizedCropAndInterpolation)]
            steps[crops[0]] = v2.RandomCrop(self.size, padding=self.padding)

    def __call__(self, image: Any) -> Tensor:
        return self._pipeline(to_pil(image, self._mode))


def _to_float() -> Callable:
    import torch

    return v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
