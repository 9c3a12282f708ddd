"""Semantic tokens for window attention: a few per window, on maps of any size (section 3.2 of the STViT paper).

The windows of a map are pooled to `per_window` x `per_window` centres each. Together they lie on a grid, the semantic
map, in raster order. The map is thought to be padded to whole windows at its bottom and right; how padding is treated
is the mask mode:

- `exact`: padding is never read. Pooling ignores it, attention masks it, a centre whose cell holds nothing else starts
  at 0, and such tokens are not read by any layer.
- `official`: what the released detection backbone does, see `ReleasedPadding`; pooling takes padding for zeros.
- `none`: the same without its mask: queries attend padding wherever their key window holds some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from core.layers.recorded import fixed
from stvit.models.block import Block, set_shortcut
from stvit.models.derived import constant, derived
from stvit.models.key_windows import KeyWindows, ReleasedPadding, WindowKeys, dense_mask
from stvit.models.pooling import build_pool
from stvit.models.tokens import stochastic_depth
from stvit.models.window_attention import window_attention
from stvit.models.windows import into_windows, padded_size, split_windows, valid_cells

MASK_MODES = ("exact", "official", "none")
GLOBAL_IN = ("query", "key", "both-units")


@dataclass(frozen=True)
class TokenGrid:
    """Where the semantic tokens of a map lie.

    Attributes:
        hw: `(H, W)` of the map of image tokens.
        window: side of a window in image tokens.
        per_window: semantic tokens per window side.
    """

    hw: tuple[int, int]
    window: int
    per_window: int

    @property
    def padded(self) -> tuple[int, int]:
        """The map filled up to whole windows."""
        return tuple(padded_size(size, self.window) for size in self.hw)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of semantic tokens."""
        return tuple(size // self.window * self.per_window for size in self.padded)

    @property
    def valid(self) -> tuple[int, int]:
        """Leading rows and columns of them that were pooled from at least one real position."""
        return tuple(valid_cells(size, self.window, self.per_window) for size in self.hw)

    def released(self, mask_mode: str, grid: tuple[int, int]) -> ReleasedPadding | None:
        """The padding that attention on keys of `grid` sees, by mask mode; None: none of it."""
        if mask_mode == "exact":
            return None
        bottom, right = (padded - size for padded, size in zip(self.padded, self.hw, strict=True))
        return ReleasedPadding(grid, bottom, right, masked=mask_mode == "official")


def check_mask_mode(mask_mode: str) -> str:
    """`mask_mode` if there is such a one.

    Raises:
        ValueError: there is not.
    """
    if mask_mode not in MASK_MODES:
        raise ValueError(f"unknown mask_mode {mask_mode!r}: use one of {', '.join(MASK_MODES)}")
    return mask_mode


class WindowCrossBlock(Block):
    """A `Block` whose queries attend the keys of a larger window around their own one.

    Args:
        dim: channels C.
        num_heads: attention heads.
        windows: geometry, see `KeyWindows`.
        method: how windows are attended, see `window_attention`.
        options: further arguments of `Block`.
    """

    def __init__(
        self, dim: int, num_heads: int, windows: KeyWindows, *, method: str = "auto", **options: object
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.windows = windows
        self.method = method

    def forward(self, x: Tensor, y: Tensor, keys: WindowKeys, *, own: Tensor | None = None) -> Tensor:
        """Update `x` `(B, H*W, C)` on `keys.grid` from `y` `(B, Hk*Wk, C)` on `keys.key_grid`.

        `own` `(B, H*W, C)`: further keys of their own window, with `keys.own`.
        """
        normed = self.norm1(x)
        if own is not None:
            own = normed if own is x else self.norm1(own)
        # A token of zeros is normalised to the bias of the norm.
        update = window_attention(
            self.attn, normed, self.norm1(y), keys, own=own, padding=self.norm1.bias, method=self.method
        )
        update = self.ls1(update)
        return self._feed_forward(self._attended(x, update))

    def window_weights(self, x: Tensor, y: Tensor, keys: WindowKeys, *, own: Tensor | None = None) -> Tensor:
        """Attention probabilities `(B, heads, H*W, M)`, float32, on the keys `[own; y; padding]`; see `forward`."""
        sources = [self.norm1(source) for source in ([y] if own is None else [own, y])]
        if keys.released is not None:
            sources.append(self.norm1.bias.expand(x.shape[0], 1, -1))
        k, _ = self.attn.keys_values(*sources)
        return self.attn.weights(self.attn.queries(self.norm1(x)), k, derived(dense_mask, x, keys))


class WindowTokenGenerator(nn.Module):
    """`per_window` x `per_window` semantic tokens for every window of a map of any size.

    1. centres `P`: every window pooled by itself;
    2. layer 1: `T = FFN([P +] MHA(P, keys of a window around))`;
    3. layer 2: `T = FFN((T + G) + MHA(T + G, keys))`, with global centres `G` where there are some; further layers
       likewise without `G`. Image tokens never change.

    `key_mode` says what the keys are. `concat` (the released classification model): the tokens themselves (in a
    windowed layer those of the same window) and image tokens, key windows moved inside the map. `window` (the released
    dense backbone): image tokens alone, key windows centred, cut off at the map's edge.

    Args:
        dim: channels C.
        num_heads: attention heads.
        window: side of a window in image tokens.
        per_window: semantic tokens per window side.
        key_windows: side of the key window of each layer in image tokens, one per layer; None: all image tokens.
        key_mode: `window` or `concat`.
        mask_mode: `exact`, `official` or `none`; the latter two concern `key_mode="window"`.
        pool: as in `SemanticTokenGenerator`, applied to every window. None: none, `forward` starts from given tokens.
        shortcut: whether layer 1 keeps its residual, the pooled centres.
        use_conv_pos: adds a depth-wise 3x3 convolution of each window's centres to them, as a position encoding.
        learned_pos: adds a learned vector to every centre, as a position encoding.
        use_global: whether there are global centres.
        global_in: `query` or `key`, see `SemanticTokenGenerator` (`both-units` is `query` here).
        global_grid: grid of global centres and learned positions; they are resampled for maps with another one.
        drop_path: stochastic depth, one rate or one per layer.
        method: how windows are attended, see `window_attention`.
        options: further arguments of every `Block`.

    Raises:
        ValueError: unknown mode, or global centres without a second layer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        per_window: int = 3,
        key_windows: Sequence[int | None] = (14, 21),
        key_mode: str = "window",
        mask_mode: str = "exact",
        pool: str | None = "max",
        shortcut: bool = True,
        use_conv_pos: bool = False,
        learned_pos: bool = False,
        use_global: bool = False,
        global_in: str = "query",
        global_grid: tuple[int, int] = (6, 6),
        drop_path: float | Sequence[float] = 0.0,
        method: str = "auto",
        **options: object,
    ) -> None:
        super().__init__()
        if key_mode not in ("window", "concat"):
            raise ValueError(f"unknown key_mode {key_mode!r}: use 'window' or 'concat'")
        if global_in not in GLOBAL_IN:
            raise ValueError(f"unknown global_in {global_in!r}: use one of {', '.join(GLOBAL_IN)}")
        if use_global and len(key_windows) < 2:
            raise ValueError("global centres enter the second generation layer: use two layers or use_global=False")
        if use_global and global_in == "key" and key_mode == "window":
            raise ValueError("global_in='key' needs semantic tokens among the keys: use key_mode='concat'")
        self.window = window
        self.per_window = per_window
        self.concat = key_mode == "concat"
        self.mask_mode = "exact" if self.concat else check_mask_mode(mask_mode)
        self.pool = None if pool is None else build_pool(pool, dim, (per_window, per_window))
        self.conv_pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if use_conv_pos else None
        self.global_in = global_in
        self.global_grid = global_grid
        self.position: nn.Parameter | None = None
        if learned_pos:
            self.position = nn.Parameter(torch.empty(1, global_grid[0] * global_grid[1], dim))
            trunc_normal_(self.position, std=0.02)
        self.global_centres: nn.Parameter | None = None
        if use_global:
            self.global_centres = nn.Parameter(torch.empty(1, global_grid[0] * global_grid[1], dim))
            trunc_normal_(self.global_centres, std=0.02)
        self.layers = nn.ModuleList()
        for size, rate in zip(key_windows, stochastic_depth(drop_path, len(key_windows)), strict=True):
            if size is None:
                self.layers.append(Block(dim, num_heads, drop_path=rate, **options))
                continue
            windows = KeyWindows(per_window, size, window, inside=self.concat)
            self.layers.append(WindowCrossBlock(dim, num_heads, windows, drop_path=rate, method=method, **options))
        set_shortcut(self.layers[0], shortcut)

    def tokens_of(self, hw: tuple[int, int]) -> TokenGrid:
        """Where the semantic tokens of an `(H, W)` map lie."""
        return TokenGrid(hw, self.window, self.per_window)

    def token_grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Grid of the semantic tokens of an `(H, W)` map."""
        return self.tokens_of(hw).size

    def valid_tokens(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Leading rows and columns of the token grid whose tokens were pooled from at least one real position."""
        return self.tokens_of(hw).valid

    def centres(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Initial centres of raster tokens `x` `(B, H*W, C)`, raster order of `token_grid(hw)`: `(B, S, C)`.

        Raises:
            ValueError: the generator was built without pooling.
        """
        if self.pool is None:
            raise ValueError("a generator with pool=None starts from given tokens: pass them, or name a pooling")
        padded = self.tokens_of(hw).padded
        windows = rearrange(into_windows(x, hw, self.window), "n (h w) c -> n h w c", h=self.window)
        valid = None
        if padded != hw and self.mask_mode == "exact":
            valid = repeat(derived(_real_positions, x, hw, self.window), "n h w -> (b n) h w", b=x.shape[0])
        return self._raster(self.pool(windows, valid), padded)

    def forward(self, x: Tensor, hw: tuple[int, int], tokens: Tensor | None = None) -> Tensor:
        """Semantic tokens `(B, S, C)`, raster order of `token_grid(hw)`, of raster tokens `x` `(B, H*W, C)`.

        `tokens` `(B, S, C)`: start from these instead of pooled centres.
        """
        tokens = self._start(x, hw, tokens)
        for index in range(len(self.layers)):
            tokens = self._layer(index, tokens, x, hw)
        return tokens

    def token_maps(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """What each semantic token is made of: `(B, S, H, W)`, float32, every map sums to 1.

        The mean over heads of the last layer's attention on image tokens (the rest is left out and the maps
        renormalised).
        """
        tokens = self._start(x, hw, None)
        for index in range(len(self.layers) - 1):
            tokens = self._layer(index, tokens, x, hw)
        weights = self._layer(len(self.layers) - 1, tokens, x, hw, weights=True).mean(dim=1)
        first = tokens.shape[1] if self.concat else 0
        weights = weights[..., first : first + x.shape[1]]
        return rearrange(weights / weights.sum(dim=-1, keepdim=True), "b s (h w) -> b s h w", h=hw[0])

    def _start(self, x: Tensor, hw: tuple[int, int], tokens: Tensor | None) -> Tensor:
        tokens = self.centres(x, hw) if tokens is None else tokens
        if self.position is not None:
            tokens = tokens + resample_tokens(self.position, self.global_grid, self.token_grid(hw))
        if self.conv_pos is None:
            return tokens
        side, grid = self.per_window, self.token_grid(hw)
        windows = rearrange(split_windows(tokens, grid, side), "n (h w) c -> n c h w", h=side)
        return tokens + self._raster(rearrange(self.conv_pos(windows), "n c h w -> n h w c"), self.tokens_of(hw).padded)

    def _layer(self, index: int, tokens: Tensor, x: Tensor, hw: tuple[int, int], *, weights: bool = False) -> Tensor:
        """Generation layer `index` (or its attention probabilities)."""
        layer, where = self.layers[index], self.tokens_of(hw)
        queries = own = tokens
        if index == 1 and self.global_centres is not None:
            centres = resample_tokens(self.global_centres, self.global_grid, where.size)
            queries, own = (tokens, tokens + centres) if self.global_in == "key" else (tokens + centres, tokens)
        if isinstance(layer, WindowCrossBlock):
            call = layer.window_weights if weights else layer
            released = where.released(self.mask_mode, where.padded)
            keys = WindowKeys(layer.windows, where.size, hw, hw, released, where.valid if self.concat else None)
            return call(queries, x, keys, own=own if self.concat else None)
        if not self.concat:
            return layer.attention_weights(queries, x) if weights else layer(queries, x)
        mask = readable(x, where, others=fixed(x, 1)[0])
        if weights:
            return layer.attention_weights(queries, [own, x], mask=mask)
        return layer(queries, [own, x], mask=mask)

    def _raster(self, windows: Tensor, padded: tuple[int, int]) -> Tensor:
        return rearrange(
            windows,
            "(b nh nw) h w c -> b (nh h nw w) c",
            nh=padded[0] // self.window,
            nw=padded[1] // self.window,
        )


def readable(like: Tensor, where: TokenGrid, *, others: int = 0) -> Tensor | None:
    """`readable_mask` on the device of `like`, or None when all tokens may be attended."""
    return None if where.valid == where.size else derived(readable_mask, like, where, others)


def readable_mask(where: TokenGrid, others: int, *, device: torch.device) -> Tensor:
    """Boolean `(1, S + others)`: which semantic tokens are more than padding; the `others` behind them all are."""
    tokens = torch.zeros(where.size, dtype=torch.bool, device=device)
    tokens[: where.valid[0], : where.valid[1]] = True
    return torch.cat([tokens.flatten(), torch.ones(others, dtype=torch.bool, device=device)])[None]


def _real_positions(hw: tuple[int, int], window: int, *, device: torch.device) -> Tensor:
    """Boolean `(windows, window, window)`: positions of a map that are no padding."""
    real = into_windows(torch.ones(1, hw[0] * hw[1], 1, dtype=torch.bool, device=device), hw, window)
    return rearrange(real, "n (h w) 1 -> n h w", h=window)


def resample_tokens(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Learned tokens `(1, S, C)` on `grid` for another grid, bicubically."""
    if grid == to:
        return tokens

    def resampled() -> Tensor:
        maps = rearrange(tokens, "1 (h w) c -> 1 c h w", h=grid[0])
        maps = nn.functional.interpolate(maps.float(), size=to, mode="bicubic", align_corners=False).to(tokens.dtype)
        return rearrange(maps, "1 c h w -> 1 (h w) c")

    return constant(resampled)
