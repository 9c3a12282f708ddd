"""Recovery: image tokens read the semantic tokens, so that a map of full resolution comes back (STViT-R)."""

from __future__ import annotations

from torch import Tensor, nn

from stvit.models.block import Block
from stvit.models.tokens import WindowCrossBlock
from stvit.models.windows import KeyWindows, padded_size, valid_cells


class TokenRecovery(nn.Module):
    """One layer `X <- Block(X, S)`: every image token attends all semantic tokens.

    Args:
        dim: channels C.
        num_heads: attention heads.
        options: further arguments of `Block`.
    """

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__()
        self.layer = Block(dim, num_heads, **options)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Image tokens `x` `(B, N, C)` from semantic tokens `(B, S, C)`; returns `(B, N, C)`."""
        return self.layer(x, tokens)


class WindowTokenRecovery(nn.Module):
    """Recovery on maps of any size: the tokens of a window attend the semantic tokens of a neighbourhood.

    The counterpart of `WindowTokenGenerator`; semantic tokens that stand for padding alone are never attended.

    Args:
        dim: channels C.
        num_heads: attention heads.
        window: side of a window in image tokens.
        per_window: semantic tokens per window side.
        key_window: side of the attended window in semantic tokens.
        method: see `window_attention`.
        options: further arguments of `Block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        per_window: int = 3,
        key_window: int = 27,
        method: str = "auto",
        **options: object,
    ) -> None:
        super().__init__()
        self.window = window
        self.per_window = per_window
        self.layer = WindowCrossBlock(
            dim, num_heads, KeyWindows(window, key_window, per_window), method=method, **options
        )

    def forward(self, x: Tensor, hw: tuple[int, int], tokens: Tensor) -> Tensor:
        """Image tokens `x` `(B, H*W, C)`, `hw = (H, W)`, from semantic tokens `(B, S, C)`; returns `(B, H*W, C)`.

        Semantic tokens lie in raster order of the grid with `per_window` rows and columns for every window of the map.
        """
        token_grid = tuple(padded_size(size, self.window) // self.window * self.per_window for size in hw)
        valid = tuple(valid_cells(size, self.window, self.per_window) for size in hw)
        return self.layer(x, tokens, grid=hw, key_grid=token_grid, valid=valid)
