"""What semantic tokens are compared with in models with windows: as many tokens per window, made without attention.

Windows and patch merging need tokens on a regular grid. Methods that leave another number of tokens in every window
(merging, dropping by score) therefore have no place here; pooling does, and so does one random token per cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from stvit.models.controls import scattered
from stvit.models.derived import derived
from stvit.models.dumbbell import SemanticLayers
from stvit.models.tokens import stochastic_depth
from stvit.models.window_tokens import WindowTokenGenerator
from stvit.models.windows import into_windows

WINDOW_TOKENS = ("semantic", "pooled", "random")


class PooledWindowTokens(WindowTokenGenerator):
    """The windows' centres without generation: pooling, then self-attention among the centres only.

    It has as many layers as a `WindowTokenGenerator`, with the same parameters, and takes its place.

    Args:
        dim: channels C.
        num_heads: attention heads.
        depth: number of layers.
        window: side of a window in image tokens.
        per_window: tokens per window side.
        pool: `max`, `avg`, `weighted` or `weighted_offset`; None: none, `forward` starts from given tokens.
        local_global: see `SemanticLayers`.
        drop_path: stochastic depth, one rate or one per layer.
        options: further arguments of every `Block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        depth: int = 2,
        window: int = 7,
        per_window: int = 3,
        pool: str | None = "max",
        local_global: str = "alternate",
        drop_path: float | Sequence[float] = 0.0,
        **options: object,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            window=window,
            per_window=per_window,
            key_windows=(None,) * depth,
            key_mode="concat",
            pool=pool,
            **options,
        )
        rates = stochastic_depth(drop_path, depth)
        self.layers = SemanticLayers(dim, num_heads, rates, per_window=per_window, local_global=local_global, **options)

    def forward(self, x: Tensor, hw: tuple[int, int], tokens: Tensor | None = None) -> Tensor:
        """Tokens `(B, S, C)`, raster order of `token_grid(hw)`, of raster tokens `x` `(B, H*W, C)`.

        `tokens` `(B, S, C)`: start from these instead of centres.
        """
        tokens = self.centres(x, hw) if tokens is None else tokens
        return self.layers(tokens, self.tokens_of(hw))

    def token_maps(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Nothing to show.

        Raises:
            ValueError: always.
        """
        raise ValueError("token maps are the attention of semantic tokens: build the model with tokens='semantic'")


class RandomWindowTokens(PooledWindowTokens):
    """One random image token for every cell of a window, chosen without looking; the rest is dropped.

    The cells are those that pooling would fill, without overlap, so that the tokens still lie on a grid. While training
    every sample keeps its own; in evaluation all keep the same, so that results repeat. Padding is never chosen; a cell
    that holds nothing else gives 0.

    Args:
        dim: channels C.
        num_heads: attention heads.
        seed: choice of the tokens in evaluation.
        options: further arguments of `PooledWindowTokens`, without `pool`.
    """

    def __init__(self, dim: int, num_heads: int, *, seed: int = 0, **options: object) -> None:
        super().__init__(dim, num_heads, pool=None, **options)
        self.seed = seed

    def centres(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """The kept tokens of raster tokens `x` `(B, H*W, C)`, raster order of `token_grid(hw)`: `(B, S, C)`."""
        windows = into_windows(x, hw, self.window)
        choice = derived(_choice, x, hw, self.window, self.per_window)  # (windows, cells, positions)
        if self.training:
            rank = torch.rand(windows.shape[:2], device=x.device)
        else:
            rank = scattered(torch.arange(choice.shape[0] * choice.shape[2], device=x.device), self.seed)
            rank = repeat(rank.float() / 2**32, "(n p) -> (b n) p", b=x.shape[0], p=choice.shape[2])
        # Positions of other cells come last, padding of the own cell before them.
        place = (rank[:, None] + repeat(choice, "n c p -> (b n) c p", b=x.shape[0])).argmin(dim=2)
        kept = windows.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
        return self._raster(rearrange(kept, "n (h w) c -> n h w c", h=self.per_window), self.tokens_of(hw).padded)


def _choice(hw: tuple[int, int], window: int, per_window: int, *, device: torch.device) -> Tensor:
    """`(windows, cells, positions)`: 0 for real positions of a cell, 1 for padding inside it, 2 for other cells."""
    real = into_windows(torch.ones(1, hw[0] * hw[1], 1, device=device), hw, window)
    cell = torch.arange(window, device=device)
    cell = ((cell + 1) * per_window - 1) // window  # cell i ends at floor((i + 1) * window / per_window)
    cell = rearrange(per_window * cell[:, None] + cell, "h w -> (h w)")
    own = cell == torch.arange(per_window**2, device=device)[:, None]
    return torch.where(own, 1 - rearrange(real, "n p 1 -> n 1 p"), 2.0)


def build_window_tokens(
    tokens: str,
    dim: int,
    num_heads: int,
    *,
    generation: Mapping[str, object],
    local_global: str = "alternate",
    **options: object,
) -> WindowTokenGenerator:
    """What makes the tokens of every window: `semantic`, `pooled` or `random`.

    Args:
        tokens: the method.
        dim: channels C.
        num_heads: attention heads.
        generation: arguments that only `WindowTokenGenerator` has, `key_windows` among them.
        local_global: attention of the controls' layers, see `SemanticLayers`.
        options: arguments that all have.

    Raises:
        ValueError: a method that has no place in models with windows, or an unknown one.
    """
    if tokens == "semantic":
        return WindowTokenGenerator(dim, num_heads, **generation, **options)
    depth = len(generation["key_windows"])
    if tokens == "pooled":
        return PooledWindowTokens(dim, num_heads, depth=depth, local_global=local_global, **options)
    if tokens == "random":
        options.pop("pool", None)
        return RandomWindowTokens(dim, num_heads, depth=depth, local_global=local_global, **options)
    reason = {
        "tome": "merging leaves another number of tokens in every window",
        "evit": "there is no class token, and dropping leaves another number of tokens in every window",
        "topk": "dropping by score leaves another number of tokens in every window",
        "dynamicvit": "its decisions leave another number of tokens in every window",
        "ats": "sampling leaves another number of tokens in every window",
        "all": "that is SwinTransformer(stem='conv')",
    }.get(tokens, "there is no such method")
    raise ValueError(
        f"tokens={tokens!r} does not go with windows: {reason}. Window attention and patch merging need a regular "
        f"grid: use one of {', '.join(WINDOW_TOKENS)}"
    )
