"""The semantic token generation module (STGM): image tokens in, a few cluster centres out.

`SemanticTokenGenerator` is the paper's form for a plain ViT (section 3.2, equations 1 to 5): one small grid of centres
reads the whole image. `WindowTokenGenerator` is its local form for maps of any size: every window gets its own centres,
which read a larger window around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from stvit.models.block import Block, block_stack
from stvit.models.pooling import build_pool
from stvit.models.windows import KeyWindows, padded_size, split_windows, valid_cells, window_attention


def stochastic_depth(rate: float | Sequence[float], depth: int) -> list[float]:
    """One drop-path rate per layer from one number for all or a sequence.

    Raises:
        ValueError: the sequence is not `depth` long.
    """
    rates = [float(rate)] * depth if isinstance(rate, int | float) else [float(r) for r in rate]
    if len(rates) != depth:
        raise ValueError(f"drop_path has {len(rates)} rates for {depth} layers")
    return rates


class SemanticTokenGenerator(nn.Module):
    """A grid of semantic tokens for a whole image.

    1. centres `P = pool(X)`;
    2. layer 1: `S = FFN(P + MHA(P, X, X))`;
    3. layer 2: `S = FFN((S + G) + MHA(S + G, [S; X], [S; X]))` with learned global centres `G`; further layers likewise
       without `G`. `X` itself never changes.

    Args:
        dim: channels C.
        num_heads: attention heads.
        grid: `(height, width)` of the tokens, or one number for a square: S = height * width tokens.
        depth: generation layers.
        pool: `max`, `avg`, `weighted`, `weighted_offset` (see `build_pool`), or `none`: the global centres alone are
            the initial centres, and are not added again.
        use_global: whether there are global centres.
        global_in: where they enter layer 2: `query` (query and residual) or `key` (a position encoding of the keys S).
        shortcut: whether layer 1 keeps its residual P.
        drop_path: stochastic depth, one rate or one per layer.
        options: further arguments of every `Block` (`mlp_ratio`, `layer_scale`, `norm_eps`, ...).

    Raises:
        ValueError: a combination in which centres would be missing or global centres would never be used.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: int | tuple[int, int] = 4,
        depth: int = 2,
        pool: str = "weighted_offset",
        use_global: bool = True,
        global_in: str = "query",
        shortcut: bool = True,
        drop_path: float | Sequence[float] = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if depth < 1:
            raise ValueError(f"depth={depth}: semantic tokens need at least one generation layer")
        if global_in not in ("query", "key"):
            raise ValueError(f"unknown global_in {global_in!r}: use 'query' or 'key'")
        if pool == "none" and not use_global:
            raise ValueError("pool='none' leaves the global centres as the only initial centres: set use_global=True")
        if pool == "none" and not shortcut:
            raise ValueError("pool='none' with shortcut=False would start from nothing: set shortcut=True")
        if use_global and pool != "none" and depth < 2:
            raise ValueError("global centres enter the second generation layer: use depth >= 2 or use_global=False")
        self.global_in = global_in
        self.pool = build_pool(pool, dim, self.grid) if pool != "none" else None
        self.global_centres: nn.Parameter | None = None
        if use_global:
            self.global_centres = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim))
            trunc_normal_(self.global_centres, std=0.02)
        self.layers = block_stack(dim, num_heads, stochastic_depth(drop_path, depth), **options)
        self.layers[0].shortcut = shortcut

    @property
    def num_tokens(self) -> int:
        """Number of semantic tokens S."""
        return self.grid[0] * self.grid[1]

    def centres(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Initial centres `(B, S, C)` of raster tokens `x` `(B, H*W, C)` with `hw = (H, W)`."""
        if self.pool is None:
            return self.global_centres.repeat(x.shape[0], 1, 1)
        return self.pool(rearrange(x, "b (h w) c -> b h w c", h=hw[0])).flatten(1, 2)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Semantic tokens `(B, S, C)` of raster tokens `x` `(B, H*W, C)` with `hw = (H, W)`."""
        tokens = self.centres(x, hw)
        for index, layer in enumerate(self.layers):
            tokens = layer(*self._inputs(index, tokens, x))
        return tokens

    def token_maps(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """What each semantic token is made of: `(B, S, H, W)`, float32, every map sums to 1.

        The mean over heads of the last generation layer's attention on image tokens (its attention on semantic tokens
        is left out and the rest renormalised).
        """
        tokens = self.centres(x, hw)
        for index, layer in enumerate(self.layers[:-1]):
            tokens = layer(*self._inputs(index, tokens, x))
        weights = self.layers[-1].attention_weights(*self._inputs(len(self.layers) - 1, tokens, x))
        weights = weights.mean(dim=1)[..., -x.shape[1] :]
        return rearrange(weights / weights.sum(dim=-1, keepdim=True), "b s (h w) -> b s h w", h=hw[0])

    def _inputs(self, index: int, tokens: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Queries and keys of generation layer `index`."""
        if index == 0:
            return tokens, [x]
        if index > 1 or self.pool is None or self.global_centres is None:
            return tokens, [tokens, x]
        if self.global_in == "key":
            return tokens, [tokens + self.global_centres, x]
        return tokens + self.global_centres, [tokens, x]


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

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        grid: tuple[int, int],
        key_grid: tuple[int, int],
        valid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Update `x` `(B, H*W, C)` on `grid` from `y` `(B, Hk*Wk, C)` on `key_grid`.

        `valid` counts the leading rows and columns of the key grid that may be attended; default all.
        """
        update = window_attention(
            self.attn,
            self.norm1(x),
            grid,
            self.norm1(y),
            key_grid,
            self.windows,
            valid=valid,
            method=self.method,
        )
        update = self.ls1(update)
        return self._feed_forward(x + self.drop_path(update) if self.shortcut else update)


class WindowTokenGenerator(nn.Module):
    """`per_window` x `per_window` semantic tokens for every window of a map of any size.

    Centres are pooled inside each window; layer i then lets the tokens of a window read the `key_windows[i]`-sided
    window of image tokens around it. The map is padded to whole windows at the bottom and right; padding is never read:
    pooling ignores it, attention masks it, and a centre whose cell holds nothing else starts at 0 (such tokens are
    not to be read by later layers either: `valid_tokens`).

    Args:
        dim: channels C.
        num_heads: attention heads.
        window: side of a window in image tokens.
        per_window: semantic tokens per window side.
        key_windows: side of the key window of each layer in image tokens, one per layer.
        pool: as in `SemanticTokenGenerator`, applied to every window.
        shortcut: whether layer 1 keeps its residual, the pooled centres.
        drop_path: stochastic depth, one rate or one per layer.
        options: further arguments of every `Block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        per_window: int = 3,
        key_windows: Sequence[int] = (14, 21),
        pool: str = "max",
        shortcut: bool = True,
        drop_path: float | Sequence[float] = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        self.window = window
        self.per_window = per_window
        self.pool = build_pool(pool, dim, (per_window, per_window))
        self.layers = nn.ModuleList(
            WindowCrossBlock(dim, num_heads, KeyWindows(per_window, size, window), drop_path=rate, **options)
            for size, rate in zip(key_windows, stochastic_depth(drop_path, len(key_windows)), strict=True)
        )
        self.layers[0].shortcut = shortcut

    def token_grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Grid of the semantic tokens of an `(H, W)` map."""
        return tuple(padded_size(size, self.window) // self.window * self.per_window for size in hw)

    def valid_tokens(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Leading rows and columns of the token grid whose tokens were pooled from at least one real position."""
        return tuple(valid_cells(size, self.window, self.per_window) for size in hw)

    def centres(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Initial centres of raster tokens `x` `(B, H*W, C)`, raster order of `token_grid(hw)`: `(B, S, C)`."""
        padded = tuple(padded_size(size, self.window) for size in hw)
        valid = None
        if padded != hw:
            behind = (0, padded[1] - hw[1], 0, padded[0] - hw[0])
            x = rearrange(x, "b (h w) c -> b h w c", h=hw[0])
            x = nn.functional.pad(x, (0, 0, *behind)).flatten(1, 2)
            real = nn.functional.pad(torch.ones(1, *hw, 1, dtype=torch.bool, device=x.device), (0, 0, *behind))
            real = split_windows(real.flatten(1, 2), padded, self.window)
            valid = repeat(real, "n (h w) 1 -> (b n) h w", b=x.shape[0], h=self.window)
        windows = rearrange(split_windows(x, padded, self.window), "n (h w) c -> n h w c", h=self.window)
        return rearrange(
            self.pool(windows, valid),
            "(b nh nw) h w c -> b (nh h nw w) c",
            nh=padded[0] // self.window,
            nw=padded[1] // self.window,
        )

    def forward(self, x: Tensor, hw: tuple[int, int], tokens: Tensor | None = None) -> Tensor:
        """Semantic tokens `(B, S, C)`, raster order of `token_grid(hw)`, of raster tokens `x` `(B, H*W, C)`.

        `tokens` `(B, S, C)`: start from these instead of pooled centres.
        """
        grid = self.token_grid(hw)
        tokens = self.centres(x, hw) if tokens is None else tokens
        for layer in self.layers:
            tokens = layer(tokens, x, grid=grid, key_grid=hw)
        return tokens
