"""Halving and doubling of feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class UpsampleConv(nn.Module):
    """Nearest doubling followed by a 3x3 convolution, in one step: `(B, C, H, W)` to `(B, C, 2H, 2W)`.

    After nearest doubling several taps of the kernel read the same value. Their weights are added up beforehand, so
    that 16 instead of 36 products are left per input position and pair of channels; borders are the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The doubled map."""
        height, width = x.shape[-2:]
        x = F.pad(x, (1, 1, 1, 1))
        parts = []
        # An even row of the result sees the input row above it once and its own twice; an odd one its own twice and the
        # one below once. The same holds for columns.
        for i, rows in enumerate(_two_taps(self.conv.weight, 2)):
            for j, weight in enumerate(_two_taps(rows, 3)):
                window = x[:, :, i : i + height + 1, j : j + width + 1]
                parts.append(F.conv2d(window, weight, self.conv.bias))
        return rearrange(torch.stack(parts), "(i j) b c h w -> b c (h i) (w j)", i=2)


def _two_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The three taps along `dim` as two, for even and for odd places of a doubled input."""
    first, middle, last = weight.split(1, dim=dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


class Upsample(nn.Module):
    """Nearest doubling without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, 2H, 2W)`."""
        return F.interpolate(x, scale_factor=2, mode="nearest")


class DownsampleConv(nn.Module):
    """3x3 convolution of stride 2 that pads with zeros on the right and at the bottom only (VQGAN)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, H/2, W/2)`."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Downsample(nn.AvgPool2d):
    """Mean of 2x2 positions."""

    def __init__(self) -> None:
        super().__init__(2)
