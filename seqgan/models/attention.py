"""Self-attention over the positions of a feature map: all of them, inside tiles, or among evenly spaced positions."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SPANS = ("all", "regional", "dilated")


def partition(x: Tensor, span: str, window: int) -> Tensor:
    """Groups of positions of `x` `(B, H, W, C)` that attend to each other: `(B, G, T, C)`.

    `all`: one group, row by row. `regional`: tiles of `window x window` neighbours. `dilated`: `window x window`
    positions that lie H/window rows and W/window columns apart.

    Raises:
        ValueError: an unknown span, or the window does not divide the map.
    """
    if span not in SPANS:
        raise ValueError(f"unknown span {span!r}: use {', '.join(SPANS)}")
    if span == "all":
        return rearrange(x, "b h w c -> b 1 (h w) c")
    if x.shape[1] % window or x.shape[2] % window:
        raise ValueError(
            f"a window of {window} does not divide a map of {x.shape[1]} x {x.shape[2]}: choose a window that does, or "
            "images of another size"
        )
    if span == "regional":
        return rearrange(x, "b (gh h) (gw w) c -> b (gh gw) (h w) c", h=window, w=window)
    return rearrange(x, "b (h gh) (w gw) c -> b (gh gw) (h w) c", h=window, w=window)


def unpartition(groups: Tensor, span: str, window: int, size: tuple[int, int]) -> Tensor:
    """The map `(B, H, W, C)` of `size` `(H, W)` that `partition` took apart."""
    height = size[0]
    if span == "all":
        return rearrange(groups, "b 1 (h w) c -> b h w c", h=height)
    if span == "regional":
        return rearrange(groups, "b (gh gw) (h w) c -> b (gh h) (gw w) c", gh=height // window, h=window)
    return rearrange(groups, "b (gh gw) (h w) c -> b (h gh) (w gw) c", gh=height // window, h=window)


class SpatialAttention(nn.Module):
    """`x + proj(attention(norm(x)))` among groups of positions.

    With one head over all positions it is the attention block of VQGAN.

    Args:
        dim: channels C.
        num_heads: heads.
        span: which positions attend to each other, see `partition`.
        window: side of the groups of positions; a map that is smaller than it is one group.
        groups: of channels that are normalised together.
        zero_init: start with a projection of zeros, so that the block does nothing at first.

    Raises:
        ValueError: the heads do not divide the channels, or an unknown span.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        span: str = "all",
        window: int = 8,
        groups: int = 32,
        *,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be split into {num_heads} heads of equal size")
        if span not in SPANS:
            raise ValueError(f"unknown span {span!r}: use {', '.join(SPANS)}")
        self.num_heads, self.span, self.window = num_heads, span, window
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if zero_init:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` in and out."""
        size = (int(x.shape[-2]), int(x.shape[-1]))  # numbers also while torch.jit records
        window = min(self.window, *size)
        groups = partition(self.norm(x).permute(0, 2, 3, 1), self.span, window)
        q, k, v = rearrange(self.qkv(groups), "b g t (three n d) -> three (b g) n t d", three=3, n=self.num_heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "(b g) n t d -> b g t (n d)", b=x.shape[0])
        return x + unpartition(self.proj(mixed), self.span, window, size).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Span and heads, for printing."""
        return f"span={self.span}, num_heads={self.num_heads}, window={self.window}"


class RegionalDilatedAttention(nn.Sequential):
    """Regional, then dilated attention: neighbours first, then every tile sees the whole map (Zhao et al. 2021).

    The paper gives neither window, norm nor start; counts of its table 3 say that there is no MLP (8 C^2 weights).

    Args:
        dim: channels C.
        window: side of the groups of positions.
        head_dim: channels of a head; fewer channels than that are one head.
        groups: of channels that are normalised together.
        zero_init: start as the identity.
    """

    def __init__(
        self, dim: int, window: int = 8, head_dim: int = 64, groups: int = 32, *, zero_init: bool = True
    ) -> None:
        heads = max(dim // head_dim, 1)
        super().__init__()
        self.regional = SpatialAttention(dim, heads, "regional", window, groups, zero_init=zero_init)
        self.dilated = SpatialAttention(dim, heads, "dilated", window, groups, zero_init=zero_init)
