"""Halving and doubling of feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Row k: which of the three taps of a kernel fall on one input position, once the input is doubled. Transposed and
# strided by two, the four sums do what nearest upsampling and the kernel do together.
_TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


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
        weight = self.conv.weight
        taps = torch.tensor(_TAPS, dtype=weight.dtype, device=weight.device)
        summed = torch.einsum("ak,bl,oikl->ioab", taps, taps, weight)
        return F.conv_transpose2d(x, summed, self.conv.bias, stride=2, padding=1)


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
