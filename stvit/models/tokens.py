"""The semantic token generation module (STGM): image tokens in, a few cluster centres out.

`SemanticTokenGenerator` is the paper's form for a plain ViT (section 3.2, equations 1 to 5): one small grid of centres
reads the whole image. Its local form for window attention is `WindowTokenGenerator` in `window_tokens.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from core.layers.recorded import fixed
from stvit.models.block import block_stack, set_shortcut
from stvit.models.pooling import build_pool


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
        position: what tells the centres where they are, added to them: `none`, `learned` (a vector each) or `conv` (a
            depth-wise 3x3 convolution of their map).
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
        position: str = "none",
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
        if position not in ("none", "learned", "conv"):
            raise ValueError(f"unknown position {position!r}: use 'none', 'learned' or 'conv'")
        if use_global and pool != "none" and depth < 2:
            raise ValueError("global centres enter the second generation layer: use depth >= 2 or use_global=False")
        self.global_in = global_in
        self.pool = build_pool(pool, dim, self.grid) if pool != "none" else None
        self.global_centres: nn.Parameter | None = None
        if use_global:
            self.global_centres = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim))
            trunc_normal_(self.global_centres, std=0.02)
        self.position: nn.Parameter | None = None
        if position == "learned":
            self.position = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim))
            trunc_normal_(self.position, std=0.02)
        self.conv_pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if position == "conv" else None
        self.layers = block_stack(dim, num_heads, stochastic_depth(drop_path, depth), **options)
        set_shortcut(self.layers[0], shortcut)

    @property
    def num_tokens(self) -> int:
        """Number of semantic tokens S."""
        return self.grid[0] * self.grid[1]

    def centres(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Initial centres `(B, S, C)` of raster tokens `x` `(B, H*W, C)` with `hw = (H, W)`, with their position."""
        if self.pool is None:
            centres = self.global_centres.repeat(x.shape[0], 1, 1)
        else:
            centres = self.pool(rearrange(x, "b (h w) c -> b h w c", h=hw[0])).flatten(1, 2)
        if self.position is not None:
            return centres + self.position
        if self.conv_pos is None:
            return centres
        encoded = self.conv_pos(rearrange(centres, "b (h w) c -> b c h w", h=self.grid[0]))
        return centres + rearrange(encoded, "b c h w -> b (h w) c")

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Semantic tokens `(B, S, C)` of raster tokens `x` `(B, H*W, C)` with `hw = (H, W)`.

        Tokens in front of the raster (registers) are not read.
        """
        *_, tokens = self.steps(x, hw)
        return tokens

    def steps(self, x: Tensor, hw: tuple[int, int]) -> Iterator[Tensor]:
        """The semantic tokens `(B, S, C)` after every layer; the last ones are what `forward` returns."""
        x = _raster(x, hw)
        tokens = self.centres(x, hw)
        for index, layer in enumerate(self.layers):
            tokens = layer(*self._inputs(index, tokens, x))
            yield tokens

    def token_maps(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """What each semantic token is made of: `(B, S, H, W)`, float32, every map sums to 1.

        The mean over heads of the last generation layer's attention on image tokens (its attention on semantic tokens
        is left out and the rest renormalised).
        """
        x = _raster(x, hw)
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


def _raster(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """The last H*W of the tokens `x` `(B, prefix + H*W, C)`."""
    first = fixed(x, 1)[0] - hw[0] * hw[1]
    return x[:, first:] if first else x
