"""Discriminators: VQGAN's of patches, and MaskGIT's in the manner of StyleGAN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """One logit per overlapping patch (PatchGAN), as VQGAN has it.

    Args:
        in_channels: of the images.
        ndf: width of the first layer.
        n_layers: strided layers; VQGAN has 3 with 1024 codes and 2 with 16384.
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(pairwise(widths)):
            stride = 2 if i + 2 < len(widths) else 1
            layers += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Logits `(B, 1, h, w)` of images `(B, C, H, W)`."""
        return self.main(image)


class Blur(nn.Module):
    """Halves maps with the binomial filter 1 3 3 1 along both axes."""

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, H/2, W/2)`."""
        channels = int(x.shape[1])  # a number also while torch.jit records
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


class DiscriminatorBlock(nn.Module):
    """Two convolutions and a halving beside a shortcut; the sum is divided by sqrt 2."""

    def __init__(self, in_dim: int, out_dim: int, *, blur: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, in_dim, 3, padding=1)
        self.down = Blur() if blur else nn.AvgPool2d(2)
        self.conv2 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.shortcut = nn.Conv2d(in_dim, out_dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H/2, W/2)`."""
        h = self.down(F.leaky_relu(self.conv1(x), 0.2))
        h = F.leaky_relu(self.conv2(h), 0.2)
        return (h + self.shortcut(self.down(x))) / math.sqrt(2)


class StyleDiscriminator(nn.Module):
    """One logit per image: residual blocks down to 4x4, as in MaskGIT (no statistics of the minibatch).

    Args:
        image_size: side of the images, a power of two from 8 on.
        channel_multiplier: scales widths from 64x64 on.
        blur: halve with a binomial filter; otherwise by mean.
        channels: width by side of the map; None: StyleGAN2's table.

    Raises:
        ValueError: a size that is no power of two, or that the table lacks.
    """

    def __init__(
        self,
        image_size: int = 256,
        channel_multiplier: int = 1,
        *,
        blur: bool = True,
        channels: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"images of side {image_size}: the side must be a power of two from 8 on")
        table = {4: 512, 8: 512, 16: 512, 32: 512}
        table |= {64 * 2**i: (256 >> i) * channel_multiplier for i in range(5)}
        table = table if channels is None else {int(side): width for side, width in channels.items()}
        sides = [image_size >> i for i in range(image_size.bit_length() - 2)]
        missing = [side for side in sides if side not in table]
        if missing:
            raise ValueError(f"no width for maps of side {missing}: add them to channels")
        widths = [table[side] for side in sides]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b, blur=blur) for a, b in pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * 16, widths[-1])
        self.head = nn.Linear(widths[-1], 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Logits `(B, 1)` of images `(B, 3, S, S)`."""
        x = F.leaky_relu(self.stem(image), 0.2)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.conv_out(x), 0.2)
        # Flattened row, column, channel, as in published weights.
        x = F.leaky_relu(self.hidden(x.permute(0, 2, 3, 1).flatten(1)), 0.2)
        return self.head(x)
