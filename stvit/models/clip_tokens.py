"""Semantic tokens of videos: a few per window and frame slice (section 4.4 of the STViT paper; reconstructed).

The paper says that tokens are generated for every frame by itself and that attention windows are those of Video Swin,
which include time; no code was released. Here pooling stays inside a slice of the token clip, and the queries and keys
of the generation layers share a window in time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from core.layers.recorded import fixed
from stvit.models.block import Block, set_shortcut
from stvit.models.clip_windows import pad_clip
from stvit.models.derived import derived
from stvit.models.key_windows import KeyWindows, WindowKeys, gather_index
from stvit.models.pooling import build_pool
from stvit.models.tokens import stochastic_depth
from stvit.models.window_tokens import TokenGrid
from stvit.models.windows import into_windows, padded_size


class ClipTokenGenerator(nn.Module):
    """`per_window` x `per_window` semantic tokens for every window of every slice of a token clip.

    1. centres `P`: every window of every slice pooled by itself;
    2. layer 1: `S = FFN(P + MHA(P, [P; X], [P; X]))`, keys from an enlarged window around;
    3. layer 2: `S = FFN(S + MHA(S, [S; X], [S; X]))` for 2x2 windows together; further layers likewise. `X` itself
       never changes.

    The clip is thought to be padded to whole windows at the bottom and right. Pooling ignores padding, cells without
    anything else give no token, and padding is never attended: the tokens are those of real positions alone.

    Args:
        dim: channels C.
        num_heads: attention heads.
        window: side of a window in image tokens.
        per_window: semantic tokens per window side, s.
        frames: slices of a window in time, which all layers attend together; 1 keeps to single slices.
        key_windows: side of the key window of each layer in image tokens, one per layer. Windows are moved inside the
            map.
        concat: whether semantic tokens of the same window are keys besides the image tokens.
        pool: `max`, `avg`, `weighted` or `weighted_offset` (see `build_pool`), applied to every window.
        shortcut: whether layer 1 keeps its residual, the pooled centres.
        drop_path: stochastic depth, one rate or one per layer.
        options: further arguments of every `Block`.

    Raises:
        ValueError: no layer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        per_window: int = 3,
        frames: int = 8,
        key_windows: Sequence[int] = (10, 14),
        concat: bool = True,
        pool: str = "max",
        shortcut: bool = True,
        drop_path: float | Sequence[float] = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        if not key_windows:
            raise ValueError("key_windows is empty: semantic tokens need at least one generation layer")
        self.window = window
        self.per_window = per_window
        self.pool = build_pool(pool, dim, (per_window, per_window))
        self.layers = nn.ModuleList()
        for size, rate in zip(key_windows, stochastic_depth(drop_path, len(key_windows)), strict=True):
            side = 2 if self.layers else 1  # later layers take 2x2 windows together
            geometry = KeyWindows(side * per_window, size, side * window, inside=True)
            self.layers.append(
                ClipCrossBlock(dim, num_heads, geometry, frames=frames, concat=concat, drop_path=rate, **options)
            )
        set_shortcut(self.layers[0], shortcut)

    def token_grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Grid of the semantic tokens of an `(H, W)` slice: those that stand for at least one real position."""
        return TokenGrid(hw, self.window, self.per_window).valid

    def centres(self, x: Tensor) -> Tensor:
        """Initial centres `(B, T, h, w, C)` on `token_grid` of image tokens `(B, T, H, W, C)`, slice by slice."""
        slices, *hw = fixed(x, 1, 2, 3)
        hw = tuple(hw)
        where = TokenGrid(hw, self.window, self.per_window)
        windows = into_windows(rearrange(x, "b t h w c -> (b t) (h w) c"), hw, self.window)
        windows = rearrange(windows, "n (h w) c -> n h w c", h=self.window)
        valid = None
        if where.padded != hw:
            real = derived(_real_positions, x, hw, self.window)
            valid = repeat(real, "n h w -> (slices n) h w", slices=windows.shape[0] // real.shape[0])
        centres = rearrange(
            self.pool(windows, valid),
            "(b t nh nw) h w c -> b t (nh h) (nw w) c",
            t=slices,
            nh=where.padded[0] // self.window,
            nw=where.padded[1] // self.window,
        )
        return centres[:, :, : where.valid[0], : where.valid[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Semantic tokens `(B, T, h, w, C)` on `token_grid` of image tokens `(B, T, H, W, C)`."""
        tokens = self.centres(x)
        for layer in self.layers:
            tokens = layer(tokens, x)
        return tokens

    def token_maps(self, x: Tensor) -> Tensor:
        """What each semantic token is made of: `(B, T, S, H, W)`, float32; S = h * w, every map sums to 1.

        The mean over heads of the last layer's attention on the image tokens of the token's own slice (the rest is left
        out and the maps renormalised).
        """
        tokens = self.centres(x)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, x)
        return self.layers[-1].slice_weights(tokens, x)


class ClipCrossBlock(Block):
    """A `Block` whose queries attend the keys of a larger window around their own one, over several slices.

    Args:
        dim: channels C.
        num_heads: attention heads.
        windows: geometry inside a slice; key windows lie inside the map.
        frames: slices of a window in time.
        concat: whether the queries' own window is among the keys.
        options: further arguments of `Block`.
    """

    def __init__(
        self, dim: int, num_heads: int, windows: KeyWindows, *, frames: int = 8, concat: bool = True, **options: object
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.windows = windows
        self.frames = frames
        self.concat = concat

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update queries `x` `(B, T, h, w, C)` from `y` `(B, T, H, W, C)` and, with `concat`, from themselves."""
        normed = self.norm1(x)
        update = self.ls1(self._cross(normed, self.norm1(y)))
        return self._feed_forward(self._attended(x, update))

    def slice_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Attention on `y` in the query's own slice, mean over heads: `(B, T, h*w, H, W)`, float32, sums to 1."""
        keys, frames = self._keys(x, y), min(self.frames, x.shape[1])
        index, _ = derived(gather_index, x, keys)
        q, k, _ = self._windows(self.norm1(x), self.norm1(y), keys, frames)
        weights = self.attn.weights(q, k, self._mask(x, keys, frames)).mean(dim=1)
        side = self.windows.queries
        own = side * side if self.concat else 0
        weights = rearrange(weights, "n (t q) (u k) -> n t q u k", t=frames, u=frames)
        weights = weights.diagonal(dim1=1, dim2=3)[:, :, own:]  # (b nt nw) q k t: the same slice
        position = (index[:, own:] - (x.shape[2] * x.shape[3] if self.concat else 0)).clamp_min(0)
        maps = weights.new_zeros(*weights.shape[:2], frames, y.shape[2] * y.shape[3])
        position = repeat(position, "nw k -> (c nw) q t k", c=len(weights) // len(position), q=side**2, t=frames)
        maps.scatter_add_(3, position, rearrange(weights, "n q k t -> n q t k"))
        maps = rearrange(
            maps,
            "(b nt nh nw) (qh qw) t (h w) -> b (nt t) (nh qh) (nw qw) h w",
            nt=padded_size(x.shape[1], frames) // frames,
            nh=keys.count[0],
            nw=keys.count[1],
            qh=side,
            h=y.shape[2],
        )[:, : x.shape[1], : x.shape[2], : x.shape[3]].flatten(2, 3)
        return maps / maps.sum(dim=(-2, -1), keepdim=True)

    def _cross(self, x: Tensor, y: Tensor) -> Tensor:
        (slices, *grid) = fixed(x, 1, 2, 3)
        keys, frames = self._keys(x, y), min(self.frames, slices)
        out = self.attn.attend(*self._windows(x, y, keys, frames), mask=self._mask(x, keys, frames))
        out = rearrange(
            out,
            "(b nt nh nw) (t h w) c -> b (nt t) (nh h) (nw w) c",
            nt=padded_size(slices, frames) // frames,
            nh=keys.count[0],
            nw=keys.count[1],
            t=frames,
            h=self.windows.queries,
        )
        return out[:, :slices, : grid[0], : grid[1]]

    def _keys(self, x: Tensor, y: Tensor) -> WindowKeys:
        grid, key_grid = fixed(x, 2, 3), fixed(y, 2, 3)
        return WindowKeys(self.windows, grid, key_grid, key_grid, own=grid if self.concat else None)

    def _windows(self, x: Tensor, y: Tensor, keys: WindowKeys, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B*windows, heads, tokens, d)`; every token is projected once, where it lies."""
        time = padded_size(fixed(x, 1)[0], frames)
        q = rearrange(
            pad_clip(self.attn.q(x), (time, *keys.tiled)),
            "b (nt t) (nh qh) (nw qw) (heads d) -> (b nt nh nw) heads (t qh qw) d",
            t=frames,
            qh=self.windows.queries,
            qw=self.windows.queries,
            heads=self.attn.num_heads,
        )
        projected = [self.attn.kv(source).flatten(2, 3) for source in ([x, y] if self.concat else [y])]
        joined = projected[0] if len(projected) == 1 else torch.cat(projected, dim=2)
        index, _ = derived(gather_index, x, keys)
        cut = pad_clip(joined.index_select(2, index.flatten())[:, :, :, None], (time, index.numel(), 1))
        k, v = rearrange(
            cut,
            "b (nt t) (nw k) 1 (two heads d) -> two (b nt nw) heads (t k) d",
            t=frames,
            k=fixed(index, 1)[0],
            two=2,
            heads=self.attn.num_heads,
        ).unbind(0)
        return q, k, v

    def _mask(self, x: Tensor, keys: WindowKeys, frames: int) -> Tensor | None:
        """Boolean `(B*windows, 1, 1, keys)`: keys that are there; None when all are."""
        whole = keys.tiled == keys.grid and all(size >= self.windows.size for size in keys.key_grid)
        slices = fixed(x, 1)[0]
        if whole and slices % frames == 0:
            return None
        mask = derived(_visible, x, keys, slices, frames)
        return repeat(mask, "n k -> (b n) 1 1 k", b=x.shape[0])


def _visible(keys: WindowKeys, time: int, frames: int, *, device: torch.device) -> Tensor:
    """Boolean `(windows in time * windows in space, frames * K)`: which gathered keys are real."""
    _, inside = gather_index(keys, device=device)
    real = torch.arange(padded_size(time, frames), device=device) < time
    real = rearrange(real, "(nt t) -> nt 1 t 1", t=frames)
    return rearrange(real & rearrange(inside, "nw k -> 1 nw 1 k"), "nt nw t k -> (nt nw) (t k)")


def _real_positions(hw: tuple[int, int], window: int, *, device: torch.device) -> Tensor:
    """Boolean `(windows, window, window)`: positions of a slice that are no padding."""
    real = into_windows(torch.ones(1, hw[0] * hw[1], 1, dtype=torch.bool, device=device), hw, window)
    return rearrange(real, "n (h w) 1 -> n h w", h=window)
