"""The VQGAN without attention of MaskGIT: by its parameter count the paper's tokenizer (section 3, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from timm.layers import lecun_normal_
from torch import Tensor, nn

from seqgan.models.attention import RegionalDilatedAttention
from seqgan.models.checks import check_image
from seqgan.models.resample import Downsample, UpsampleConv
from seqgan.models.residual import ResidualBlock, group_norm

MULTIPLIERS = (1, 1, 2, 2, 4)
# Decoder of the paper's tables 1 and 3: (residual blocks, attention pairs) added to every level.
EXTRAS = {"none": (0, 0), "conv2": (2, 0), "attn1": (0, 1), "attn2": (0, 2)}


class ConvEncoder(nn.Module):
    """Images to features, halved between levels.

    Args:
        filters: width of the first level.
        multipliers: width of every level, as a multiple of it.
        num_res_blocks: residual blocks per level, and after the last one.
        z_dim: channels of the features.
        shortcut: of residual blocks, see `ResidualBlock`.
    """

    def __init__(
        self,
        filters: int = 128,
        multipliers: Sequence[int] = MULTIPLIERS,
        num_res_blocks: int = 2,
        z_dim: int = 256,
        shortcut: str = "official_output",
    ) -> None:
        super().__init__()
        widths = [filters * m for m in multipliers]
        self.stem = nn.Conv2d(3, filters, 3, padding=1, bias=False)
        self.levels = nn.ModuleList()
        for before, width in zip([filters, *widths], widths, strict=False):
            dims = [before, *[width] * num_res_blocks]
            self.levels.append(_blocks(dims, shortcut))
        self.down = Downsample()
        self.mid = _blocks([widths[-1]] * (num_res_blocks + 1), shortcut)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_dim, 1)
        _init(self)

    def forward(self, image: Tensor) -> Tensor:
        """Features `(B, z_dim, H/f, W/f)` of images `(B, 3, H, W)` in [-1, 1]; f doubles with every level but one.

        Raises:
            ValueError: other channels, or f does not divide the image.
        """
        check_image(image, self.stem.in_channels, 2 ** (len(self.levels) - 1))
        x = self.stem(image)
        for i, level in enumerate(self.levels):
            x = level(x if i == 0 else self.down(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class DecoderLevel(nn.Module):
    """Residual blocks, what the enhanced decoders add, and a doubling except at the finest level."""

    def __init__(self, blocks: nn.Sequential, extra: nn.Sequential, up: nn.Module) -> None:
        super().__init__()
        self.blocks, self.extra, self.up = blocks, extra, up

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C', 2H, 2W)`, or `(B, C', H, W)` at the finest level."""
        return self.up(self.extra(self.blocks(x)))


class ConvDecoder(nn.Module):
    """Features back to images.

    Args:
        filters: width of the finest level.
        multipliers: width of every level from the finest on, as a multiple of it.
        num_res_blocks: residual blocks per level, and before the coarsest one.
        z_dim: channels of the features.
        shortcut: of residual blocks, see `ResidualBlock`.
        extra: what every level has more: `none`; `conv2`, two residual blocks; `attn1`, `attn2`: one or two pairs of
            regional and dilated attention. `attn1` is the decoder of the second phase (section 3.4).
        window: of the attention.
        head_dim: of the attention.

    Raises:
        ValueError: an unknown extra.
    """

    def __init__(
        self,
        filters: int = 128,
        multipliers: Sequence[int] = MULTIPLIERS,
        num_res_blocks: int = 2,
        z_dim: int = 256,
        shortcut: str = "official_output",
        extra: str = "none",
        window: int = 8,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if extra not in EXTRAS:
            raise ValueError(f"unknown decoder extra {extra!r}: use {', '.join(EXTRAS)}")
        more_blocks, pairs = EXTRAS[extra]
        # Kept to build the enhanced decoder of the second phase from this one.
        self.arguments = {
            "filters": filters,
            "multipliers": tuple(multipliers),
            "num_res_blocks": num_res_blocks,
            "z_dim": z_dim,
            "shortcut": shortcut,
            "extra": extra,
            "window": window,
            "head_dim": head_dim,
        }
        widths = [filters * m for m in reversed(multipliers)]
        self.stem = nn.Conv2d(z_dim, widths[0], 3, padding=1)
        self.mid = _blocks([widths[0]] * (num_res_blocks + 1), shortcut)
        self.levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            added = [ResidualBlock(width, bias=False, shortcut=shortcut) for _ in range(more_blocks)]
            added += [RegionalDilatedAttention(width, window, head_dim) for _ in range(pairs)]
            up = UpsampleConv(width) if i + 1 < len(widths) else nn.Identity()
            blocks = _blocks([before, *[width] * num_res_blocks], shortcut)
            self.levels.append(DecoderLevel(blocks, nn.Sequential(*added), up))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        _init(self)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive weight of the adversarial loss compares gradients at."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` of features `(B, z_dim, H/f, W/f)`; values are not limited."""
        x = self.mid(self.stem(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _blocks(dims: Sequence[int], shortcut: str) -> nn.Sequential:
    """One residual block per pair of neighbours in `dims`."""
    return nn.Sequential(*(ResidualBlock(a, b, bias=False, shortcut=shortcut) for a, b in pairwise(dims)))


def _init(module: nn.Module) -> None:
    """Flax's start: LeCun-normal kernels, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            lecun_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
