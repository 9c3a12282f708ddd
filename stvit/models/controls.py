"""What semantic tokens are compared with: other ways to go on with the same number of layers.

Each control has the layers of a `SemanticTokenGenerator` (`layers`, same parameters) and takes its place in the model.
Tokens in front of the raster (a class token) stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from core.layers.recorded import fixed
from stvit.models.block import block_stack
from stvit.models.pooling import AdaptivePool, WeightedPool, build_pool
from stvit.models.tokens import stochastic_depth


class AllTokens(nn.Module):
    """The full ViT: no reduction, the layers are ordinary self-attention of all tokens.

    Args:
        dim: channels C.
        num_heads: attention heads.
        depth: number of layers.
        drop_path: stochastic depth, one rate or one per layer.
        options: further arguments of every `Block`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, depth: int = 2, drop_path: float | Sequence[float] = 0.0, **options: object
    ) -> None:
        super().__init__()
        self.layers = block_stack(dim, num_heads, stochastic_depth(drop_path, depth), **options)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Raster tokens `(B, H*W, C)` with `hw = (H, W)`, and any before them, to as many."""
        for layer in self.layers:
            x = layer(x)
        return x


class PooledTokens(AllTokens):
    """Pooled centres without recovery: pooling as in the paper, then self-attention among the centres only.

    Args:
        dim: channels C.
        num_heads: attention heads.
        grid: `(height, width)` of the centres, or one number for a square.
        pool: `max`, `avg`, `weighted` or `weighted_offset`.
        depth: number of layers.
        drop_path: stochastic depth, one rate or one per layer.
        options: further arguments of every `Block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: int | tuple[int, int] = 4,
        pool: str = "weighted_offset",
        depth: int = 2,
        drop_path: float | Sequence[float] = 0.0,
        **options: object,
    ) -> None:
        super().__init__(dim, num_heads, depth=depth, drop_path=drop_path, **options)
        self.pool: AdaptivePool | WeightedPool = build_pool(
            pool, dim, (grid, grid) if isinstance(grid, int) else tuple(grid)
        )

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Raster tokens `(B, H*W, C)` with `hw = (H, W)` to `(B, S, C)`; tokens before them stay before these."""
        first, x = split_prefix(x, hw)
        centres = self.pool(rearrange(x, "b (h w) c -> b h w c", h=hw[0])).flatten(1, 2)
        return super().forward(join_prefix(first, centres), hw)

    @property
    def num_tokens(self) -> int:
        """Number of centres S."""
        return self.pool.grid[0] * self.pool.grid[1]

    def rates(self, tokens: int) -> list[tuple[int, int]]:
        """Grids of up to `tokens` centres that are at most twice as wide as high, by rising area."""
        return near_squares(tokens)

    def set_rate(self, rate: tuple[int, int]) -> None:
        """Pool to a grid of `(height, width)`."""
        self.pool.grid = rate


class RandomTokens(AllTokens):
    """A random choice of the image tokens, without looking at them; the rest is dropped.

    While training every sample keeps its own random tokens. In evaluation all samples keep the same ones, chosen by
    `seed` and the number of tokens alone, so that results repeat; pass a `torch.Generator` to choose otherwise.

    Args:
        dim: channels C.
        num_heads: attention heads.
        num_tokens: how many tokens stay.
        seed: choice of the tokens in evaluation.
        depth: number of layers.
        drop_path: stochastic depth, one rate or one per layer.
        options: further arguments of every `Block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_tokens: int = 16,
        seed: int = 0,
        depth: int = 2,
        drop_path: float | Sequence[float] = 0.0,
        **options: object,
    ) -> None:
        super().__init__(dim, num_heads, depth=depth, drop_path=drop_path, **options)
        self.num_tokens = num_tokens
        self.seed = seed

    def forward(self, x: Tensor, hw: tuple[int, int], generator: torch.Generator | None = None) -> Tensor:
        """Raster tokens `(B, H*W, C)` to `(B, num_tokens, C)`, still in raster order; tokens before them stay there.

        Raises:
            ValueError: fewer tokens come in than are to be kept.
        """
        first, x = split_prefix(x, hw)
        keep = self.kept(x.shape[0], fixed(x, 1)[0], x.device, generator)
        return super().forward(join_prefix(first, x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))), hw)

    def rates(self, tokens: int) -> list[int]:
        """One token to all."""
        return list(range(1, tokens + 1))

    def set_rate(self, rate: int) -> None:
        """Keep `rate` tokens."""
        self.num_tokens = rate

    def kept(self, batch: int, total: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Ascending indices `(batch, num_tokens)` of the tokens that stay, of `total`."""
        if self.num_tokens > total:
            raise ValueError(f"cannot keep {self.num_tokens} of {total} tokens: reduce token_grid or enlarge the image")
        if generator is not None:
            rank = torch.rand(batch, total, generator=generator, device=generator.device).to(device)
        elif self.training:
            rank = torch.rand(batch, total, device=device)
        else:
            rank = scattered(torch.arange(total, device=device), self.seed).expand(batch, -1)
        return rank.argsort(dim=1)[:, : self.num_tokens].sort(dim=1).values


def split_prefix(x: Tensor, hw: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
    """Tokens `(B, prefix + H*W, C)` as those in front, `(B, prefix, C)` or None, and the raster `(B, H*W, C)`."""
    prefix = fixed(x, 1)[0] - hw[0] * hw[1]
    return (x[:, :prefix], x[:, prefix:]) if prefix else (None, x)


def join_prefix(first: Tensor | None, x: Tensor) -> Tensor:
    """Inverse of `split_prefix`."""
    return x if first is None else torch.cat([first, x], dim=1)


def near_squares(tokens: int, aspect: float = 2.0) -> list[tuple[int, int]]:
    """Grids `(height, width)`, height <= width <= aspect * height, of up to `tokens` tokens, by rising area."""
    grids = {
        height * width: (height, width)
        for height in range(1, int(tokens**0.5) + 1)
        for width in range(height, min(int(aspect * height), tokens // height) + 1)
    }  # of grids with one area the last, the squarest, stays
    return [grids[area] for area in sorted(grids)]


def scattered(index: Tensor, seed: int) -> Tensor:
    """Integers mixed to 32 well-scattered bits (multiply, xor, shift): random numbers without random state.

    Unlike a seeded generator it is plain tensor arithmetic, so that evaluation can be compiled and exported.
    """
    bits = 0xFFFFFFFF
    value = (index + (seed + 1) * 0x9E3779B9) & bits
    for factor in (0x7FEB352D, 0x42365345):  # odd and below 2**31: products stay within int64
        value = ((value ^ (value >> 16)) * factor) & bits
        value = value ^ (value >> 15)
    return value ^ (value >> 16)
