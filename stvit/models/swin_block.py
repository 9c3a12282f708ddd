"""Swin's layer: self-attention inside windows, plain or shifted (Swin, sections 3.2 and 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from core.layers.recorded import fixed
from stvit.models.attention import add_mask, relative_bias
from stvit.models.derived import derived
from stvit.models.windows import crop_grid, merge_windows, pad_grid, padded_size, split_windows


class WindowSelfAttention(nn.Module):
    """Self-attention of the tokens of a window, with a learned bias per head for every relative position.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: number of heads.
        window: side of the windows that relative positions are learned for.
        qkv_bias: whether the packed projection to queries, keys and values has a bias.
        attn_drop: dropout on attention weights while training.
        proj_drop: dropout after the output projection while training.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} cannot be split into num_heads={num_heads} heads of equal size")
        self.num_heads = num_heads
        self.window = window
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Update the tokens of windows.

        Args:
            x: `(B*windows, height*width, C)`.
            size: `(height, width)` of a window.
            mask: boolean `(windows, N, N)`, True where a token may attend another.

        Returns:
            `(B*windows, height*width, C)`.
        """
        q, k, v = rearrange(self.qkv(x), "w n (three h d) -> three w h n d", three=3, h=self.num_heads).unbind(0)
        bias = relative_bias(self.relative_position_bias_table, (self.window, self.window), size, q.dtype)[None]
        if mask is not None:
            bias = repeat(add_mask(bias, mask[:, None]), "w h n m -> (b w) h n m", b=x.shape[0] // mask.shape[0])
        drop = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        return self.proj_drop(self.proj(rearrange(out, "w h n d -> w n (h d)")))


class SwinBlock(nn.Module):
    """`x <- x + DropPath(ls1 * (S)W-MSA(LN1 x))`, then `x <- x + DropPath(ls2 * MLP(LN2 x))`, on maps of any size.

    Maps that windows do not tile are zero-padded at the bottom and right after the norm; like every Swin, windows
    attend that padding. With a shift, windows are cut from the map rolled by it, and tokens attend only those that
    were neighbours before.

    Args:
        dim: channels C.
        num_heads: attention heads.
        window: side of the windows.
        shift: how far windows are shifted down and to the right, below `window`.
        fixed_window: True: windows never shrink and are shifted on every map, as in the detection backbones (maps
            below the window are padded to one). False: an axis that is no longer than the window is one window and is
            not shifted, as in the classification models.
        mlp_ratio: width of the MLP's hidden layer in units of C.
        qkv_bias: bias in the packed projection.
        layer_scale: initial value of the per-channel scales `ls1`, `ls2`; None leaves them out, as Swin does.
        drop_path: probability of dropping each residual branch, per sample, while training.
        attn_drop: dropout on attention weights.
        proj_drop: dropout after the attention projection and inside the MLP.
        norm_eps: epsilon of both layer norms.

    Raises:
        ValueError: a shift outside `[0, window)`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        shift: int = 0,
        fixed_window: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not 0 <= shift < window:
            raise ValueError(f"shift={shift} must be at least 0 and below window={window}")
        self.window = window
        self.shift = shift
        self.fixed_window = fixed_window
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = WindowSelfAttention(
            dim, num_heads, window, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU, drop=proj_drop)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Raster tokens `(B, H*W, C)` with `hw = (H, W)` to as many."""
        x = x + self.drop_path(self.ls1(self._attention(self.norm1(x), hw)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def _attention(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        window, shift = zip(*(self._axis(size) for size in hw), strict=True)
        padded = tuple(padded_size(size, side) for size, side in zip(hw, window, strict=True))
        x = pad_grid(x, hw, padded)
        if not any(shift):
            return crop_grid(
                merge_windows(self.attn(split_windows(x, padded, window), window), padded, window), padded, hw
            )
        forth, back, mask = derived(_shifted, x, padded, window, shift)
        count = fixed(mask, 0)[0]
        windows = rearrange(x.index_select(1, forth), "b (w n) c -> (b w) n c", w=count)
        x = rearrange(self.attn(windows, window, mask), "(b w) n c -> b (w n) c", w=count)
        return crop_grid(x.index_select(1, back), padded, hw)

    def _axis(self, size: int) -> tuple[int, int]:
        """Side of the windows and shift along an axis of `size` tokens."""
        if self.fixed_window or size > self.window:
            return self.window, self.shift
        return size, 0


def _shifted(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Shifted windows as a permutation of raster tokens `(H*W,)`, its inverse, and their masks `(windows, N, N)`.

    The rolled map is made of up to nine pieces that were apart before; tokens attend their own piece.
    """
    place = torch.arange(grid[0] * grid[1], device=device).reshape(1, *grid, 1)
    rolled = torch.roll(place, (-shift[0], -shift[1]), dims=(1, 2)).flatten(1, 2)
    forth = split_windows(rolled, grid, window).flatten()
    pieces = []
    for size, side, by in zip(grid, window, shift, strict=True):
        position = torch.arange(size, device=device)
        pieces.append((position >= size - side).long() + (position >= size - by).long() if by else position * 0)
    piece = rearrange(3 * pieces[0][:, None] + pieces[1], "h w -> 1 (h w) 1")
    piece = rearrange(split_windows(piece, grid, window), "w n 1 -> w n")
    return forth, forth.argsort(), piece[:, :, None] == piece[:, None, :]
