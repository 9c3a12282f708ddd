"""Recovery: image tokens read the semantic tokens, so that a map of full resolution comes back (STViT-R)."""

from __future__ import annotations

from torch import Tensor, nn

from stvit.models.block import Block
from stvit.models.key_windows import KeyWindows, WindowKeys
from stvit.models.window_tokens import TokenGrid, WindowCrossBlock, check_mask_mode, readable


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
    """Recovery on maps of any size: the tokens of a window attend the semantic tokens of a neighbourhood, or all.

    The counterpart of `WindowTokenGenerator`.

    Args:
        dim: channels C.
        num_heads: attention heads.
        window: side of a window in image tokens.
        per_window: semantic tokens per window side.
        key_window: side of the attended window in semantic tokens; None: all of them.
        mask_mode: `exact`: semantic tokens that stand for padding alone are never attended; `official` or `none`: as
            the release does, see `ReleasedPadding` (only with a key window).
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
        key_window: int | None = 27,
        mask_mode: str = "exact",
        method: str = "auto",
        **options: object,
    ) -> None:
        super().__init__()
        self.window = window
        self.per_window = per_window
        self.mask_mode = check_mask_mode(mask_mode)
        if key_window is None:
            self.layer = Block(dim, num_heads, **options)
        else:
            windows = KeyWindows(window, key_window, per_window)
            self.layer = WindowCrossBlock(dim, num_heads, windows, method=method, **options)

    def forward(self, x: Tensor, hw: tuple[int, int], tokens: Tensor) -> Tensor:
        """Image tokens `x` `(B, H*W, C)`, `hw = (H, W)`, from semantic tokens `(B, S, C)`; returns `(B, H*W, C)`.

        Semantic tokens lie in raster order of the grid with `per_window` rows and columns for every window of the map.
        """
        where = TokenGrid(hw, self.window, self.per_window)
        if not isinstance(self.layer, WindowCrossBlock):
            return self.layer(x, tokens, mask=readable(x, where) if self.mask_mode == "exact" else None)
        released = where.released(self.mask_mode, where.size)
        return self.layer(x, tokens, WindowKeys(self.layer.windows, hw, where.size, where.valid, released))
