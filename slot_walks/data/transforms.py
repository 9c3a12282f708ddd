"""From pictures and label maps to tensors, as the released code and the field's tables crop and scale them.

Every transform is called as `transform(image, masks)` with a PIL image and label maps `{name: (H, W) int32}`; it
returns the image `(3, h, w)` float32 and the maps `{name: (h, w) int64}`. Called with a picture alone it returns the
image alone. Pictures are resized by PIL, which rounds to 8 bits, before they become floats; label maps by nearest
pixel. All are dataclasses: their repr says everything that they do, which is what a feature cache records. Those for
training say what they make of a picture, too: `views()` are transforms without chance, one for each outcome (None: too
many), and `choose()` draws one of them as a call would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from core.layers.statistics import IMAGENET_MEAN, IMAGENET_STD

Masks = Mapping[str, np.ndarray]
Sample = tuple[Tensor, dict[str, Tensor]]
Normalize = Literal["pm1", "imagenet", "none"]

_NORMALIZE = ("pm1", "imagenet", "none")


@dataclass(frozen=True)
class Window:
    """A part of a picture in pixels; the right and lower bounds do not belong to it."""

    left: int
    top: int
    right: int
    bottom: int

    def cut(self, image: Image.Image, masks: Masks) -> tuple[Image.Image, dict[str, np.ndarray]]:
        """That part of a picture and of its label maps.

        Raises:
            ValueError: nothing of the picture is inside.
        """
        if self.right <= self.left or self.bottom <= self.top:
            raise ValueError(f"{self} is empty in a picture of {image.width} x {image.height}: is its box wrong?")
        box = (self.left, self.top, self.right, self.bottom)
        cut = {name: mask[self.top : self.bottom, self.left : self.right] for name, mask in masks.items()}
        return image.crop(box), cut


def bird_window(box: Sequence[float], size: tuple[int, int], extent: float = 0.75) -> Window:
    """The surroundings of an object, square as far as the picture goes (section 5.1 of the recipe for Birds).

    Args:
        box: x, y, width, height of the object; fractions of pixels are dropped.
        size: width and height of the picture.
        extent: half the side of the window as a part of the box's longer side.
    """
    x, y, w, h = (int(v) for v in box)
    radius = int(extent * max(w, h))
    cx, cy = int((2 * x + w) / 2), int((2 * y + h) / 2)
    return Window(max(0, cx - radius), max(0, cy - radius), min(size[0], cx + radius), min(size[1], cy + radius))


@dataclass
class Square:
    """Both sides to one length, whatever the aspect: foreground extraction, and MOVi's evaluation.

    size       side in pixels
    normalize  pm1: to [-1, 1], as released for foreground extraction; imagenet: its mean and deviation; none: [0, 1]
    """

    size: int = 128
    normalize: Normalize = "pm1"

    def __post_init__(self) -> None:
        _check(self.normalize)

    def __call__(self, image: Image.Image, masks: Masks | None = None) -> Sample | Tensor:
        image = F.resize(image, [self.size, self.size], F.InterpolationMode.BILINEAR)
        return _finish(image, _each(masks, lambda mask: _nearest(mask, [self.size, self.size])), self.normalize)

    def views(self) -> list[Square]:
        """Itself."""
        return [self]

    def choose(self) -> int:
        """The only view."""
        return 0


@dataclass
class CropTrain:
    """Shorter side to `short`, a crop, a flip: training of object discovery.

    Draws from torch's global generator, which is seeded for every sample.

    short      shorter side before the crop; None: as it is (MOVi)
    size       side of the crop
    crop       random, or center (COCO as released)
    flip       probability of mirroring
    normalize  see `Square`
    """

    short: int | None = 256
    size: int = 224
    crop: Literal["random", "center"] = "random"
    flip: float = 0.5
    normalize: Normalize = "imagenet"

    def __post_init__(self) -> None:
        _check(self.normalize)
        if self.crop not in ("random", "center"):
            raise ValueError(f"CropTrain: crop={self.crop!r}; use random or center")
        if self.short is not None and self.short < self.size:
            raise ValueError(f"CropTrain: a crop of {self.size} does not fit into a shorter side of {self.short}")

    def __call__(self, image: Image.Image, masks: Masks | None = None) -> Sample | Tensor:
        if self.short is not None:
            image = F.resize(image, [self.short], F.InterpolationMode.BICUBIC)
            masks = _each(masks, lambda mask: _nearest(mask, [image.height, image.width]))
        if min(image.size) < self.size:
            raise ValueError(f"a picture of {image.width} x {image.height} has no crop of {self.size}: set short")
        if self.crop == "random":
            top = int(torch.randint(image.height - self.size + 1, ()))
            left = int(torch.randint(image.width - self.size + 1, ()))
        else:
            top, left = (round((side - self.size) / 2) for side in (image.height, image.width))
        image, cut = Window(left, top, left + self.size, top + self.size).cut(image, masks or {})
        if float(torch.rand(())) < self.flip:
            image = F.horizontal_flip(image)
            cut = {name: mask[:, ::-1] for name, mask in cut.items()}
        return _finish(image, None if masks is None else cut, self.normalize)

    def views(self) -> list[CropTrain] | None:
        """The central crop as it is and mirrored; None for random crops."""
        return None if self.crop == "random" else [replace(self, flip=float(flip)) for flip in (0, 1)]

    def choose(self) -> int:
        """1 for the mirrored one."""
        return int(float(torch.rand(())) < self.flip)


@dataclass
class OfficialEval:
    """The released evaluation of object discovery: the middle of the picture as it is, then enlarged.

    Pictures that are smaller than the crop are surrounded with black, label maps with background.

    crop       side of the crop
    size       side after enlarging
    normalize  see `Square`
    """

    crop: int = 224
    size: int = 320
    normalize: Normalize = "imagenet"

    def __post_init__(self) -> None:
        _check(self.normalize)

    def __call__(self, image: Image.Image, masks: Masks | None = None) -> Sample | Tensor:
        image = F.resize(F.center_crop(image, [self.crop]), [self.size], F.InterpolationMode.BILINEAR)

        def enlarge(mask: np.ndarray) -> np.ndarray:
            middle = F.center_crop(_as_picture(mask), [self.crop])
            return _nearest(np.asarray(middle), [self.size, self.size])

        return _finish(image, _each(masks, enlarge), self.normalize)


@dataclass
class StandardEval:
    """Shorter side to `size`, then the middle: evaluation as in the field's tables.

    size       side of the image
    mask_size  side of the label maps; None: as the image. Segments are compared at this size
    normalize  see `Square`
    """

    size: int = 320
    mask_size: int | None = None
    normalize: Normalize = "imagenet"

    def __post_init__(self) -> None:
        _check(self.normalize)

    def __call__(self, image: Image.Image, masks: Masks | None = None) -> Sample | Tensor:
        height, width = image.height, image.width
        image = F.center_crop(F.resize(image, [self.size], F.InterpolationMode.BICUBIC), [self.size])
        side = self.mask_size or self.size

        def middle(mask: np.ndarray) -> np.ndarray:
            # torchvision's rule, so that the maps stay on their picture: the longer side is cut to whole pixels.
            shape = [side, int(side * width / height)] if height <= width else [int(side * height / width), side]
            return np.asarray(F.center_crop(_as_picture(_nearest(mask, shape)), [side]))

        return _finish(image, _each(masks, middle), self.normalize)


@dataclass
class WholePicture:
    """A picture of any shape as a whole, its shorter side brought to `size`: a user's own files.

    Both sides are whole numbers of patches, so the aspect is kept up to half a patch; a picture that is longer than
    `longest` times its width is squeezed to that.

    size           shorter side
    patch_size     of the backbone
    normalize      see `Square`
    channel_order  rgb, or bgr where the model was trained on it (Dogs and Cars as released)
    longest        largest ratio of the sides
    """

    size: int = 320
    patch_size: int = 8
    normalize: Normalize = "imagenet"
    channel_order: Literal["rgb", "bgr"] = "rgb"
    longest: float = 4.0

    def __post_init__(self) -> None:
        _check(self.normalize)
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"WholePicture: channel_order={self.channel_order!r}; use rgb or bgr")
        if self.size < self.patch_size or self.longest < 1:
            raise ValueError(f"WholePicture: size={self.size} holds no patch, or longest={self.longest} is below 1")

    def __call__(self, image: Image.Image) -> Tensor:
        """`(3, h, w)` float32 of an RGB picture."""
        shorter = min(image.size)
        sides = (min(side / shorter, self.longest) * self.size for side in (image.height, image.width))
        shape = [max(1, round(side / self.patch_size)) * self.patch_size for side in sides]
        image = F.resize(image, shape, F.InterpolationMode.BICUBIC)
        if self.channel_order == "bgr":  # before the mean is taken off, as the data sets do
            image = Image.fromarray(np.asarray(image)[..., ::-1].copy())
        return _finish(image, None, self.normalize)

    def undo(self, pixels: Tensor) -> np.ndarray:
        """The picture, uint8 `(h, w, 3)` RGB, of a normalised `(3, h, w)`."""
        pixels = pixels.detach().float().cpu()
        if self.normalize == "pm1":
            pixels = (pixels + 1) / 2
        elif self.normalize == "imagenet":
            mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
            pixels = pixels * std + mean
        pixels = pixels if self.channel_order == "rgb" else pixels.flip(0)
        return (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def _check(normalize: str) -> None:
    if normalize not in _NORMALIZE:
        raise ValueError(f"normalize={normalize!r}; use {', '.join(_NORMALIZE)}")


def _each(masks: Masks | None, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray] | None:
    return None if masks is None else {name: change(mask) for name, mask in masks.items()}


def _as_picture(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(mask, dtype=np.int32))


def _nearest(mask: np.ndarray, shape: list[int]) -> np.ndarray:
    """A label map at another size `(height, width)`; PIL's nearest, not torch's, which takes other pixels."""
    return np.asarray(F.resize(_as_picture(mask), shape, F.InterpolationMode.NEAREST))


def _finish(image: Image.Image, masks: dict[str, np.ndarray] | None, normalize: Normalize) -> Sample | Tensor:
    pixels = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
    if normalize == "pm1":
        pixels = 2 * pixels - 1
    elif normalize == "imagenet":
        pixels = F.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))
    if masks is None:
        return pixels
    return pixels, {name: torch.from_numpy(mask.astype(np.int64)) for name, mask in masks.items()}
