"""Video Swin's layer: self-attention in windows over time and space, plain or shifted (Video Swin, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from core.layers.recorded import fixed
from stvit.models.clip_windows import ClipWindows, Size, relative_position_index, window_mask
from stvit.models.derived import derived


class ClipAttention(nn.Module):
    """Self-attention inside windows of a clip, with a learned bias per head for every relative position in 3-D.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: number of heads.
        window: `(frames, rows, columns)` of the largest window.
        relative_pos: whether there is a position bias.
        qkv_bias: bias in the packed projection.
        attn_drop: dropout on attention weights while training.
        proj_drop: dropout after the output projection while training.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Size,
        *,
        relative_pos: bool = True,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} cannot be split into num_heads={num_heads} heads of equal size")
        self.num_heads = num_heads
        self.window = tuple(window)
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table: nn.Parameter | None = None
        if relative_pos:
            offsets = 1
            for side in self.window:
                offsets *= 2 * side - 1
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, windows: ClipWindows, *, mask_padding: bool = True) -> Tensor:
        """Clips `x` `(B, T, H, W, C)`, cut as `windows` says, to as many tokens.

        `mask_padding`: False lets tokens attend the zeros behind the clip.
        """
        x = windows.split(x)
        bias = self.position_bias(windows.window, x.dtype)
        if not windows.needs_mask(mask_padding):
            q, k, v = self._project(x, "b n p (three h d) -> three (b n) h p d")
            out = self._attend(q, k, v, None if bias is None else bias[None])
            return windows.merge(self._join(out, "(b n) h p d -> b n p (h d)", n=windows.count))
        # Windows differ in their masks, clips do not: windows count as heads, so that one mask serves all clips.
        mask = derived(window_mask, x, windows, mask_padding)[:, None]
        if bias is not None:
            mask = bias.masked_fill(~mask, float("-inf"))
        elif self.num_heads > 1:
            mask = mask.expand(-1, self.num_heads, -1, -1)
        q, k, v = self._project(x, "b n p (three h d) -> three b (n h) p d")
        out = self._attend(q, k, v, rearrange(mask, "n h p k -> 1 (n h) p k"))
        return windows.merge(self._join(out, "b (n h) p d -> b n p (h d)", n=windows.count))

    def position_bias(self, window: Size, dtype: torch.dtype | None = None) -> Tensor | None:
        """Bias `(heads, N, N)` of a window no larger than the one that was learned; None without positions."""
        if self.relative_position_bias_table is None:
            return None
        index = derived(relative_position_index, self.relative_position_bias_table, window, self.window)
        return rearrange(self.relative_position_bias_table[index], "n m h -> h n m").to(dtype)

    def _project(self, x: Tensor, pattern: str) -> tuple[Tensor, ...]:
        return rearrange(self.qkv(x), pattern, three=3, h=self.num_heads).unbind(0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        drop = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)

    def _join(self, out: Tensor, pattern: str, **sizes: int) -> Tensor:
        return self.proj_drop(self.proj(rearrange(out, pattern, h=self.num_heads, **sizes)))


class ClipBlock(nn.Module):
    """`x <- x + DropPath(ls1 * (S)W-MSA(LN1 x))`, then `x <- x + DropPath(ls2 * MLP(LN2 x))`, on clips of any size.

    Along an axis no longer than the window, the whole axis is the window and nothing is shifted. Other clips are
    zero-padded behind to whole windows after the norm.

    Args:
        dim: channels C.
        num_heads: attention heads.
        window: `(frames, rows, columns)` of a window.
        shift: how far windows are shifted along each axis, below `window`.
        mask_padding: True: padding is never attended, so that what lies behind a clip cannot matter. False: windows
            attend the zeros, as Video Swin's own code does.
        relative_pos: learned bias for relative positions.
        mlp_ratio: width of the MLP's hidden layer in units of C.
        qkv_bias: bias in the packed projection.
        layer_scale: initial value of the per-channel scales `ls1`, `ls2`; None leaves them out.
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
        window: Size = (8, 7, 7),
        shift: Size = (0, 0, 0),
        mask_padding: bool = True,
        relative_pos: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if any(not 0 <= by < side for by, side in zip(shift, window, strict=True)):
            raise ValueError(f"shift={tuple(shift)} must be at least 0 and below window={tuple(window)} on every axis")
        self.window = tuple(window)
        self.shift = tuple(shift)
        self.mask_padding = mask_padding
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = ClipAttention(
            dim,
            num_heads,
            self.window,
            relative_pos=relative_pos,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU, drop=proj_drop)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Token clips `(B, T, H, W, C)` to as many."""
        windows = ClipWindows.fit(fixed(x, 1, 2, 3), self.window, self.shift)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), windows, mask_padding=self.mask_padding)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def half_shift(window: Size) -> Size:
    """The shift of every second layer: half a window along each axis."""
    return tuple(side // 2 for side in window)
