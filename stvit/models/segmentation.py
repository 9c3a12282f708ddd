"""Semantic segmentation on maps of a backbone: UperNet, its auxiliary head, and a head for single-scale maps.

    images -> backbone -> maps of rising stride -> head -> scores per pixel

Plain torch: any backbone that returns a tuple of maps `(B, C_i, H_i, W_i)` will do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.recorded import fixed
from stvit.models.pooling import pooled


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; the size of the map stays.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: side of the kernel, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        super().__init__(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels), act=nn.ReLU(inplace=True)))


class PyramidPooling(nn.Module):
    """PSPNet's pyramid: the map and its averages over coarse grids, mixed by a 3x3 convolution.

    Args:
        in_channels: channels of the map.
        channels: channels of every average and of the result.
        scales: sides of the grids.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.branches = nn.ModuleList(ConvNormAct(in_channels, channels, 1) for _ in self.scales)
        self.mix = ConvNormAct(in_channels + len(self.scales) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` to `(B, channels, H, W)`."""
        levels = [
            resize(branch(pooled(x, "avg", (scale, scale))), fixed(x, -2, -1))
            for scale, branch in zip(self.scales, self.branches, strict=True)
        ]
        return self.mix(torch.cat([x, *levels], dim=1))


class UperHead(nn.Module):
    """UperNet: a feature pyramid with pyramid pooling on top; all levels are fused at the finest stride.

    Args:
        in_channels: channels of the maps, finest first.
        num_classes: K.
        channels: channels inside.
        pool_scales: see `PyramidPooling`.
        drop_rate: dropout of whole channels before the classifier.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pyramid = PyramidPooling(coarsest, channels, pool_scales)
        self.lateral = nn.ModuleList(ConvNormAct(c, channels, 1) for c in finer)
        self.smooth = nn.ModuleList(ConvNormAct(channels, channels) for _ in finer)
        self.fuse = ConvNormAct(len(in_channels) * channels, channels)
        self.classifier = nn.Sequential(nn.Dropout2d(drop_rate), nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `(B, C_i, H_i, W_i)`, finest first, to scores `(B, K, H_0, W_0)`."""
        levels = [layer(x) for layer, x in zip(self.lateral, maps[:-1], strict=True)] + [self.pyramid(maps[-1])]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], fixed(levels[i - 1], -2, -1))
        levels = [layer(x) for layer, x in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        size = fixed(levels[0], -2, -1)
        return self.classifier(self.fuse(torch.cat([levels[0], *(resize(x, size) for x in levels[1:])], dim=1)))


class FCNHead(nn.Module):
    """3x3 convolutions and a classifier on one of the maps: UperNet's auxiliary head.

    Args:
        in_channels: channels of that map.
        num_classes: K.
        channels: channels inside.
        index: which of the maps.
        num_convs: convolutions before the classifier.
        drop_rate: dropout of whole channels before the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        index: int = 2,
        num_convs: int = 1,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.index = index
        sizes = [in_channels, *[channels] * num_convs]
        self.convs = nn.Sequential(*(ConvNormAct(a, b) for a, b in pairwise(sizes)))
        self.classifier = nn.Sequential(nn.Dropout2d(drop_rate), nn.Conv2d(sizes[-1], num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps to scores `(B, K, H_i, W_i)` at the stride of the chosen one."""
        return self.classifier(self.convs(maps[self.index]))


class PatchHead(nn.Module):
    """Scores of every pixel of a patch from its token alone: what the backbone does not know, the head cannot add.

    For backbones that normalise their maps.

    Args:
        in_channels: channels of the last map.
        num_classes: K.
        patch_size: side of a token's patch in pixels.
    """

    def __init__(self, in_channels: int, num_classes: int, patch_size: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(in_channels, num_classes * patch_size**2, 1)
        self.shuffle = nn.PixelShuffle(patch_size)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps to scores `(B, K, p H, p W)`."""
        return self.shuffle(self.classifier(maps[-1]))


class SegmentationNetwork(nn.Module):
    """Backbone and head; scores come at the size of the images.

    Args:
        backbone: images `(B, C, H, W)` to a tuple of maps, finest first.
        head: maps to scores of any stride.
        auxiliary_head: a second head for training; None for none.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, auxiliary_head: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.auxiliary_head = auxiliary_head

    def forward(self, images: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """Scores `(B, K, H, W)` of images `(B, C, H, W)`; with `auxiliary` also the auxiliary head's, or None."""
        maps = self.backbone(images)
        size = fixed(images, -2, -1)
        scores = resize(self.head(maps), size)
        if not auxiliary:
            return scores
        extra = None if self.auxiliary_head is None else resize(self.auxiliary_head(maps), size)
        return scores, extra


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned; the same tensor where nothing changes."""
    size = tuple(size)
    return x if fixed(x, -2, -1) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
