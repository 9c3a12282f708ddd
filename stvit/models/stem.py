"""From an image to raster tokens: a patch projection (DeiT) or a small convolutional stem (STViT-R)."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class PatchStem(nn.Module):
    """Non-overlapping patches, each projected linearly.

    Images whose sides are no multiple of the patch are zero-padded at the bottom and right.

    Args:
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        dim: channels of the tokens.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` to a token map `(B, dim, ceil(H/p), ceil(W/p))`."""
        missing = (-image.shape[2] % self.patch_size, -image.shape[3] % self.patch_size)
        if any(missing):
            image = F.pad(image, (0, missing[1], 0, missing[0]))
        return self.proj(image)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height` x `width` pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each with batch norm and hard swish, until one token covers a patch.

    With `patch_size=4` this is the stem of the released STViT-R (two convolutions, C/2 then C channels); other powers
    of two have fewer or more steps, the width doubling at each.

    Args:
        patch_size: total stride, a power of two from 2 on.
        in_chans: channels of the image.
        dim: channels of the tokens.

    Raises:
        ValueError: `patch_size` is no power of two, or `dim` cannot be halved often enough.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 1 << steps:
            raise ValueError(f"stem='conv' halves the image repeatedly: patch_size={patch_size} must be 2, 4, 8 or 16")
        if dim % (1 << (steps - 1)):
            raise ValueError(f"stem='conv' with patch_size={patch_size} needs embed_dim % {1 << (steps - 1)} == 0")
        self.steps = steps
        widths = [in_chans, *(dim >> (steps - 1 - i) for i in range(steps))]
        self.stages = nn.Sequential(*(_conv_norm_act(widths[i], widths[i + 1]) for i in range(steps)))

    def forward(self, image: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` to a token map `(B, dim, ceil(H/p), ceil(W/p))`."""
        return self.stages(image)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height` x `width` pixels."""
        return -(-height // (1 << self.steps)), -(-width // (1 << self.steps))


def _conv_norm_act(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False),
            norm=nn.BatchNorm2d(width_out),
            act=nn.Hardswish(),
        )
    )


def build_stem(kind: str, patch_size: int, in_chans: int, dim: int) -> PatchStem | ConvStem:
    """The stem named `kind`: `patch` or `conv`.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "patch":
        return PatchStem(patch_size, in_chans, dim)
    if kind == "conv":
        return ConvStem(patch_size, in_chans, dim)
    raise ValueError(f"unknown stem {kind!r}: use 'patch' or 'conv'")
