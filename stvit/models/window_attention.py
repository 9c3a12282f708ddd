"""Attention of query windows on larger key windows, every token projected once.

The dense form of STViT-R lets the semantic tokens of one 7x7 window attend the image tokens of a larger window around
it, and image tokens attend the semantic tokens of a neighbourhood. Normalisation and projection act per token, so keys
and values are projected where they lie and windows are cut from the projections: the result is the same, and the cost
does not grow with the overlap of the windows.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from core.layers.recorded import fixed
from stvit.models.attention import Attention
from stvit.models.derived import derived
from stvit.models.key_windows import WindowKeys, band_masks, dense_mask, gather_index
from stvit.models.windows import into_windows, out_of_windows

METHODS = ("auto", "banded", "gather", "masked", "per_window")


def window_attention(
    attn: Attention,
    x: Tensor,
    y: Tensor,
    keys: WindowKeys,
    *,
    own: Tensor | None = None,
    padding: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """Normalised tokens `x` `(B, H*W, C)` attend those of `y` `(B, Hk*Wk, C)` inside their key window.

    Args:
        attn: projections and heads.
        x: queries in raster order of `keys.grid`.
        y: keys in raster order of `keys.key_grid`.
        keys: which keys are seen by which queries.
        own: `(B, H*W, C)` on the grid of the queries, further keys of their own window; goes with `keys.own`.
        padding: `(C,)`, what normalisation makes of padding; needed where padding is attended (`keys.released`).
        method: one of `METHODS`; all give the same.

            - `masked`: one dense attention with a mask;
            - `banded`: one such attention for every row of windows, on the rows of keys that it sees. Keys are views of
              the projected map, nothing is copied;
            - `gather`: key windows are cut from the projected keys: the fewest products, but copies;
            - `per_window`: the keys of every window are projected anew, as the release does: many times the cost, for
              comparison;
            - `auto`: `masked` on small maps, else `gather` on CUDA and `banded` elsewhere.

    Returns:
        `(B, H*W, C)`.

    Raises:
        ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown window attention method {method!r}: use one of {', '.join(METHODS)}")
    if method == "auto":
        method = choose(keys, x.device.type)
    sources = [y] if own is None else [own, y]
    if keys.released is not None:
        sources.append(padding.expand(x.shape[0], 1, -1))
    if method == "masked":
        return attn.attend(attn.queries(x), *attn.keys_values(*sources), mask=derived(dense_mask, x, keys))
    if method == "banded":
        return _banded(attn, x, sources, keys)

    index, mask = derived(gather_index, x, keys)
    if method == "gather":
        pairs = _cut(_joined([attn.kv(source) for source in sources]), index)
    else:
        pairs = attn.kv(_cut(_joined(sources), index))
    q = rearrange(into_windows(attn.q(x), keys.grid, keys.windows.queries), "n q (h d) -> n h q d", h=attn.num_heads)
    k, v = rearrange(pairs, "n k (two h d) -> two n h k d", two=2, h=attn.num_heads).unbind(0)
    out = attn.attend(q, k, v, repeat(mask, "n k -> (b n) 1 1 k", b=x.shape[0]))
    return out_of_windows(out, keys.grid, keys.windows.queries)


def choose(keys: WindowKeys, device: str) -> str:
    """The method that `auto` stands for."""
    size, rows, columns = keys.windows.size, *keys.key_grid
    if device == "cuda":  # launches cost more than copies
        return "gather" if 2 * size**2 < rows * columns else "masked"
    return "banded" if keys.count[0] > 2 else "masked"


def _banded(attn: Attention, x: Tensor, sources: list[Tensor], keys: WindowKeys) -> Tensor:
    q = attn.queries(x)
    pairs = [attn.keys_values(source) for source in sources]
    masks = derived(band_masks, x, keys)
    width, key_width = keys.grid[1], keys.key_grid[1]
    outs = []
    for band, mask in zip(keys.bands(), masks, strict=True):
        queries = slice(band.queries[0] * width, band.queries[1] * width)
        rows = [slice(band.keys[0] * key_width, band.keys[1] * key_width)]
        rows = [queries, *rows] if keys.own is not None else rows
        rows += [slice(None)] * (len(sources) - len(rows))
        k, v = (_joined([pair[i][:, :, r] for pair, r in zip(pairs, rows, strict=True)], dim=2) for i in (0, 1))
        outs.append(attn.mix(q[:, :, queries], k, v, mask))
    return attn.join(torch.cat(outs, dim=2))


def _joined(parts: list[Tensor], dim: int = 1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _cut(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `(B, M, C)` at `index` `(windows, K)`: `(B*windows, K, C)`."""
    return rearrange(x.index_select(1, index.flatten()), "b (n k) c -> (b n) k c", k=fixed(index, 1)[0])
