"""From an image to the network's input: size, augmentation and normalisation (section 4 of the recipe)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from core.data import to_pil
from core.errors import ConfigError, nearest
from core.layers.statistics import IMAGENET_MEAN, IMAGENET_STD

AUGMENTATIONS = ("none", "rand", "simple", "centre")
NORMS = ("imagenet", "inception", "backbone")
_HALF = (0.5, 0.5, 0.5)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def statistics(norm: str = "imagenet", backbone: str | None = None) -> Statistics:
    """Mean and deviation of RGB in [0, 1] by which images are normalised.

    Args:
        norm: `imagenet`, as nearly all published tables of VTAB-1k use, also with checkpoints that were trained
            otherwise; `inception`: 0.5 and 0.5; `backbone`: what the backbone was trained with.
        backbone: timm's name of it with its tag (`vit_base_patch16_224.orig_in21k`), for `backbone`.

    Raises:
        ConfigError: another word, or a backbone that timm does not know.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm={norm}: use {', '.join(NORMS)}{nearest(norm, NORMS)}")
    if norm != "backbone":
        return (IMAGENET_MEAN, IMAGENET_STD) if norm == "imagenet" else (_HALF, _HALF)
    import timm

    try:
        known = timm.models.get_pretrained_cfg(str(backbone), allow_unregistered=False)
    except RuntimeError:
        close = nearest(str(backbone), timm.list_pretrained()) if backbone else ""
        raise ConfigError(
            f"norm=backbone needs backbone=NAME, timm's name of it with its tag, not {backbone!r}{close or '.'} "
            "norm=imagenet and norm=inception need no name"
        ) from None
    return tuple(known.mean), tuple(known.std)


@dataclass
class TransferTransform:
    """An image of any size and mode as `(3, size, size)` float32.

    size                side of the result
    aug                 `none`: resized to size x size, whatever its aspect ratio; `rand`: the same, then flip and
                        RandAugment, in place of timm's random crop; `simple` (FGVC): shorter side to 256/224 of size,
                        random crop, flip; `centre`: what `simple` is evaluated with, the crop of the middle
    flip                probability of a mirrored image, for `rand` and `simple`
    norm, backbone      see `statistics`
    interpolation       "bicubic", "bilinear", "lanczos", "nearest"; PIL resizes and antialiases
    auto_augment        timm's policy, for `rand`
    color_jitter        strength, for `rand`. timm leaves it out beside RandAugment, so that the published recipes which
                        ask for both train without it; `force_color_jitter` adds it
    """

    size: int = 224
    aug: str = "none"
    flip: float = 0.5
    norm: str = "imagenet"
    backbone: str | None = None
    interpolation: str = "bicubic"
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    force_color_jitter: bool = False
    _first: Callable[[Any], Any] = field(init=False, repr=False, compare=False)
    _then: Callable[[Any], Any] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.aug not in AUGMENTATIONS:
            raise ConfigError(f"aug={self.aug}: use {', '.join(AUGMENTATIONS)}{nearest(str(self.aug), AUGMENTATIONS)}")
        modes = {mode.value: mode for mode in v2.InterpolationMode}
        if self.interpolation not in modes:
            raise ConfigError(f"interpolation={self.interpolation}: use {', '.join(modes)}")
        if self.size < 1 or not 0 <= self.flip <= 1:
            raise ConfigError(f"size={self.size} must be positive and flip={self.flip} a probability")
        self.mean, self.std = statistics(self.norm, self.backbone)
        mode = modes[self.interpolation]
        square = v2.Resize((self.size, self.size), interpolation=mode)
        shorter = v2.Resize(int(256 / 224 * self.size), interpolation=mode)
        flip = v2.RandomHorizontalFlip(self.flip)
        self._first, self._then = {
            "none": (square, None),
            "rand": (square, self._randaugment() if self.aug == "rand" else None),
            "simple": (shorter, v2.Compose([v2.RandomCrop(self.size), flip])),
            "centre": (v2.Compose([shorter, v2.CenterCrop(self.size)]), None),
        }[self.aug]

    def _randaugment(self) -> Callable[[Any], Any]:
        """timm's training transform between its random crop and its conversion to a tensor."""
        from timm.data.transforms_factory import transforms_imagenet_train

        _, augmenting, _ = transforms_imagenet_train(
            self.size,
            color_jitter=self.color_jitter or None,
            force_color_jitter=self.force_color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,  # what RandAugment fills corners with
            std=self.std,
            separate=True,
        )
        return v2.Compose([v2.RandomHorizontalFlip(self.flip), augmenting])

    @property
    def random(self) -> bool:
        """Whether two calls may give different results."""
        return self._then is not None

    @property
    def fixed_part(self) -> str:
        """What `decoded` does, for the origin of what is kept of it."""
        shape = {"none": "square", "rand": "square", "centre": "centre"}.get(self.aug)
        if shape is None:
            raise ConfigError(
                f"aug={self.aug} crops at random before images have their final size, so that they cannot be kept: "
                "use aug: none, rand or centre, or no store"
            )
        return f"{shape} {self.size} {self.interpolation}"

    def decoded(self, image: Any) -> Tensor:
        """What of the transform is the same in every epoch: uint8 `(3, size, size)`.

        Raises:
            ConfigError: it begins with a random crop.
        """
        self.fixed_part  # noqa: B018  refuses
        return v2.functional.pil_to_tensor(self._first(to_pil(image)))

    def finish(self, pixels: Tensor) -> Tensor:
        """The rest of the transform: augmentation, then normalisation of uint8 `(3, size, size)`."""
        if self._then is not None:
            pixels = v2.functional.pil_to_tensor(self._then(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
        return self.normalise(pixels)

    def __call__(self, image: Any) -> Tensor:
        """The tensor of an image; random numbers are those of Python, numpy and torch, which the engine seeds."""
        image = self._first(to_pil(image))
        if self._then is not None:
            image = self._then(image)
        return self.normalise(v2.functional.pil_to_tensor(image))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 `(..., 3, H, W)` as the network's input, float32, on its device."""
        # As torchvision's ToTensor and Normalize of the released recipes, bit for bit, in one buffer.
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
