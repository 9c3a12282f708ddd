"""Multi-head attention with separate query and key/value projections.

One module serves every layer of STViT: self-attention of image or semantic tokens, semantic tokens that read image
tokens (generation), and image tokens that read semantic tokens (recovery).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from stvit.models.derived import constant, derived


def relative_position_index(
    height: int, width: int, table: tuple[int, int] | None = None, *, device: torch.device | None = None
) -> Tensor:
    """Row of the bias table for every (query, key) pair of one `height` x `width` window.

    The table holds the offsets inside a window of `table` = `(rows, columns)`, by default the window itself; it may be
    larger. Returns an int64 tensor `(height*width, height*width)` with values below `(2*rows-1)*(2*columns-1)`:
    vertical offset first, both shifted to start at zero (the layout of Swin's tables).
    """
    table_rows, table_columns = table or (height, width)
    down, right = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = torch.meshgrid(down, right, indexing="ij")
    position = torch.stack([rows.flatten(), columns.flatten()])  # (2, N)
    offset = position[:, :, None] - position[:, None, :]  # (2, N, N)
    return (offset[0] + table_rows - 1) * (2 * table_columns - 1) + offset[1] + table_columns - 1


def relative_bias(
    table: Tensor, window: tuple[int, int], tokens: tuple[int, int], dtype: torch.dtype | None = None
) -> Tensor:
    """Relative position bias `(heads, N, N)` of a raster of `tokens` = `(height, width)`, N = height * width.

    Args:
        table: `((2*rows-1)*(2*columns-1), heads)`, learned for windows of `window` = `(rows, columns)`.
        window: what the table was learned for. Larger rasters get the table resampled bicubically, smaller ones the
            offsets that occur in them.
        tokens: the raster.
        dtype: of the result; default that of the table.
    """
    if tokens[0] > window[0] or tokens[1] > window[1]:
        larger = (max(tokens[0], window[0]), max(tokens[1], window[1]))
        table, window = constant(partial(resize_relative_table, table, window, larger)), larger
    index = derived(relative_position_index, table, *tokens, window)
    return rearrange(table[index], "n m h -> h n m").to(dtype)


def resize_relative_table(table: Tensor, window: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Resample a table `((2*rows-1)*(2*columns-1), heads)` for windows of another size, bicubically."""
    if window == to:
        return table
    maps = rearrange(table, "(h w) heads -> 1 heads h w", h=2 * window[0] - 1)
    size = (2 * to[0] - 1, 2 * to[1] - 1)
    maps = F.interpolate(maps.float(), size=size, mode="bicubic", align_corners=False).to(table.dtype)
    return rearrange(maps, "1 heads h w -> (h w) heads")


class Attention(nn.Module):
    """`softmax(q k^T / sqrt(d) + bias) v` of queries `x` on the tokens of `y` (section 3.1 of the STViT paper).

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: number of heads; each sees C / num_heads channels.
        qkv_bias: whether the query and key/value projections have a bias.
        relative_window: `(height, width)` of the window whose tokens attend each other, or one number for a square;
            adds a learned relative position bias per head. None: no position bias.
        attn_drop: dropout on attention weights while training.
        proj_drop: dropout after the output projection while training.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        relative_window: int | tuple[int, int] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} cannot be split into num_heads={num_heads} heads of equal size")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table: nn.Parameter | None = None
        self.relative_window: tuple[int, int] | None = None
        if relative_window is not None:
            height, width = (relative_window,) * 2 if isinstance(relative_window, int) else relative_window
            self.relative_window = (height, width)
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens `x` `(B, N, C)` attend to `y` `(B, M, C)`, or to themselves when `y` is None; returns `(B, N, C)`.

        `mask` is boolean (True: may attend) or additive, broadcastable to `(B, heads, N, M)`.
        """
        return self.attend(self.queries(x), *self.keys_values(x if y is None else y), mask=mask)

    def queries(self, x: Tensor) -> Tensor:
        """Project `(B, N, C)` to queries `(B, heads, N, d)`."""
        return rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads)

    def keys_values(self, *sources: Tensor) -> tuple[Tensor, Tensor]:
        """Project sources `(B, M_i, C)` to keys and values `(B, heads, sum M_i, d)`.

        Every source is projected where it lies and only the results are joined, so that `[S; X]` is never built.
        """
        projected = [self.kv(source) for source in sources]
        joined = projected[0] if len(projected) == 1 else torch.cat(projected, dim=1)
        return tuple(rearrange(joined, "b m (two h d) -> two b h m d", two=2, h=self.num_heads).unbind(0))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Attention of projected `(B, heads, N, d)` on `(B, heads, M, d)`, heads joined and projected: `(B, N, C)`.

        `grid` is the raster of the tokens, where relative positions are learned and it differs from their window.
        """
        return self.join(self.mix(q, k, v, mask, grid))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """The first half of `attend`: values mixed by attention, `(B, heads, N, d)`."""
        drop = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._with_bias(q, mask, grid), dropout_p=drop)

    def join(self, mixed: Tensor) -> Tensor:
        """The second half of `attend`: heads joined and projected, `(B, N, C)`."""
        return self.proj_drop(self.proj(rearrange(mixed, "b h n d -> b n (h d)")))

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention probabilities `(B, heads, N, M)` in float32 of projected queries and keys, for looking at them."""
        scores = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
        mask = self._with_bias(q, mask)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)

    def _with_bias(self, q: Tensor, mask: Tensor | None, grid: tuple[int, int] | None = None) -> Tensor | None:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)  # a float32 mask on float64 queries is misread by the fused kernel
        if self.relative_position_bias_table is None:
            return mask
        window = self.relative_window
        return add_mask(relative_bias(self.relative_position_bias_table, window, grid or window, q.dtype)[None], mask)


def add_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A position bias with a mask, boolean (True: may attend) or additive; one broadcast against the other."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
