"""The VQGAN of Esser et al. (2021): attention at one resolution, strided convolutions, biases everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from seqgan.models.attention import SpatialAttention
from seqgan.models.checks import check_image
from seqgan.models.resample import Downsample, DownsampleConv, Upsample, UpsampleConv
from seqgan.models.residual import ResidualBlock, group_norm

MULTIPLIERS = (1, 1, 2, 2, 4)


class VQGANLevel(nn.Module):
    """Residual blocks, each followed by attention where the level has it, and a change of resolution.

    Names of the parts are those of the published checkpoints.
    """

    def __init__(self, dims: Sequence[int], dropout: float, *, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(a, b, dropout=dropout) for a, b in pairwise(dims))
        self.attn = nn.ModuleList(SpatialAttention(dim) for dim in dims[1:] if attention)
        self.resample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H', W')`."""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.resample(x)


class VQGANMiddle(nn.Module):
    """Two residual blocks around attention, at the coarsest resolution."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(dim, dropout=dropout)
        self.attn_1 = SpatialAttention(dim)
        self.block_2 = ResidualBlock(dim, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` in and out."""
        return self.block_2(self.attn_1(self.block_1(x)))


class VQGANEncoder(nn.Module):
    """Images to features.

    Args:
        ch: width of the first level.
        ch_mult: width of every level, as a multiple of it.
        num_res_blocks: residual blocks per level.
        attn_resolutions: sides of feature maps at which blocks are followed by attention.
        resolution: side of the images that `attn_resolutions` refers to; other sizes run as well.
        z_channels: channels of the features.
        in_channels: of the images.
        double_z: give twice the channels (of a variational encoder).
        resamp_with_conv: halve by strided convolution; otherwise by mean.
        dropout: in residual blocks.
    """

    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = MULTIPLIERS,
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        z_channels: int = 256,
        in_channels: int = 3,
        *,
        double_z: bool = False,
        resamp_with_conv: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([ch, *widths], widths, strict=False)):
            attention = resolution // 2**i in attn_resolutions
            level = VQGANLevel([before, *[width] * num_res_blocks], dropout, attention=attention)
            if i + 1 < len(widths):
                level.resample = DownsampleConv(width) if resamp_with_conv else Downsample()
            self.down.append(level)
        self.mid = VQGANMiddle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], (1 + double_z) * z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Features `(B, z, H/f, W/f)` of images `(B, 3, H, W)` in [-1, 1].

        Raises:
            ValueError: other channels, or f does not divide the image.
        """
        check_image(image, self.conv_in.in_channels, 2 ** (len(self.down) - 1))
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQGANDecoder(nn.Module):
    """Features back to images; one residual block more per level than the encoder has.

    Args:
        ch: width of the finest level.
        ch_mult: width of every level from the finest on, as a multiple of it.
        num_res_blocks: residual blocks per level, less one.
        attn_resolutions: sides of feature maps at which blocks are followed by attention.
        resolution: side of the images that `attn_resolutions` refers to.
        z_channels: channels of the features.
        out_ch: channels of the images.
        resamp_with_conv: whether a convolution follows the doubling.
        dropout: in residual blocks.
    """

    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = MULTIPLIERS,
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        z_channels: int = 256,
        out_ch: int = 3,
        *,
        resamp_with_conv: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = VQGANMiddle(widths[-1], dropout)
        levels: list[VQGANLevel] = []
        for i in reversed(range(len(widths))):
            before = widths[min(i + 1, len(widths) - 1)]
            attention = resolution // 2**i in attn_resolutions
            level = VQGANLevel([before, *[widths[i]] * (num_res_blocks + 1)], dropout, attention=attention)
            if i > 0:
                level.resample = UpsampleConv(widths[i]) if resamp_with_conv else Upsample()
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)  # index 0 is the finest, as in published files
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive weight of the adversarial loss compares gradients at."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` of features `(B, z, H/f, W/f)`; values are not limited."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
