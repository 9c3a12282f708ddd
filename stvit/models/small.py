"""SemanticTokenViT at a scale that trains within minutes on a CPU: small images, few channels, thousands of samples.

Everything about semantic tokens is inherited. What differs serves short training and is the same for every choice of
`tokens`, so comparisons between them stay fair.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from stvit.models.stem import ConvStem
from stvit.models.vit import SemanticTokenViT

POSITION_STD = 0.5


class OverlappingStem(nn.Module):
    """`ConvStem` with half of the channels, then a 3x3 convolution of stride 1 to all of them.

    A token of a 2x2 patch sees 7x7 pixels instead of 3x3: enough for a stroke with its direction.

    Args:
        patch_size: total stride, a power of two from 2 on.
        in_chans: channels of the image.
        dim: channels of the tokens.

    Raises:
        ValueError: see `ConvStem`.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.reduce = ConvStem(patch_size, in_chans, dim // 2)
        self.mix = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(dim // 2, dim, 3, padding=1, bias=False), norm=nn.BatchNorm2d(dim), act=nn.Hardswish()
            )
        )

    def forward(self, image: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` to a token map `(B, dim, ceil(H/p), ceil(W/p))`."""
        return self.mix(self.reduce(image))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height` x `width` pixels."""
        return self.reduce.grid(height, width)


class SmallSemanticTokenViT(SemanticTokenViT):
    """`SemanticTokenViT` for small images, few channels and short training from scratch.

    - The stem is an `OverlappingStem`, or with `stem="patch"` the plain projection of patches.
    - Linear layers start with deviation `fan_in ** -0.5`, the position embedding with 0.5. The paper's 0.02 for both is
      near that at 384 channels or more; at 64 it leaves attention uniform and positions unseen for most of a short
      training.

    The defaults are for 28 x 28 grey images: 196 tokens of 64 channels, 16 semantic tokens after one base layer.
    Arguments are those of `SemanticTokenViT`, whose other options keep their defaults.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 28,
        patch_size: int = 2,
        in_chans: int = 1,
        num_classes: int = 10,
        embed_dim: int = 64,
        depth: int = 4,
        num_heads: int = 2,
        *,
        base_depth: int = 1,
        stgm_depth: int = 2,
        token_grid: int | tuple[int, int] = 4,
        tokens: str = "semantic",
        pool: str = "weighted_offset",
        use_global: bool = True,
        global_in: str = "query",
        shortcut: bool = True,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        stem: str = "overlapping",
        drop_path_rate: float = 0.0,
        token_options: Mapping[str, object] | None = None,
        macs: float | None = None,
    ) -> None:
        if stem not in ("overlapping", "patch"):
            raise ValueError(f"unknown stem {stem!r}: use 'overlapping' or 'patch'")
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            embed_dim,
            depth,
            num_heads,
            base_depth=base_depth,
            stgm_depth=stgm_depth,
            token_grid=token_grid,
            tokens=tokens,
            pool=pool,
            use_global=use_global,
            global_in=global_in,
            shortcut=shortcut,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            stem="patch",
            drop_path_rate=drop_path_rate,
            token_options=token_options,
        )
        if stem == "overlapping":
            self.stem = OverlappingStem(patch_size, in_chans, embed_dim)
        if macs is not None:
            self.match_macs(macs)

    def init_weights(self) -> None:
        """As `SemanticTokenViT`, with the deviations named above; the classifier keeps 0.02."""
        super().init_weights()
        trunc_normal_(self.pos_embed, std=POSITION_STD, a=-2 * POSITION_STD, b=2 * POSITION_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.head:
                std = module.in_features**-0.5
                with torch.no_grad():
                    trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
