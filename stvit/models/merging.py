"""Patch merging between the stages of a hierarchical model (Swin, section 3.1): half the side, twice the channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PatchMerging(nn.Module):
    """2x2 neighbours joined to 4C channels, normalised and projected to 2C.

    Neighbours are joined in the order (0,0), (1,0), (0,1), (1,1) of (row, column), as in Swin's weights. Odd sides are
    zero-padded at the bottom and right.

    Args:
        dim: channels C that come in.
        norm_eps: epsilon of the layer norm.
    """

    def __init__(self, dim: int, *, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Raster tokens `(B, H*W, C)` with `hw = (H, W)` to `(B, ceil(H/2)*ceil(W/2), 2C)`."""
        x = rearrange(x, "b (h w) c -> b h w c", h=hw[0])
        if hw[0] % 2 or hw[1] % 2:
            x = F.pad(x, (0, 0, 0, hw[1] % 2, 0, hw[0] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x)).flatten(1, 2)
