"""ATS: sample the tokens that matter, as many as the image needs (Fayyaz et al., "Adaptive Token Sampling for Efficient
Vision Transformers", ECCV 2022, arXiv 2111.15667). There are no parameters, so a trained ViT can be used as it is.

A token's significance is what the class token takes from it, its attention times the length of the token's value, as a
share of all (equation 3). Tokens are drawn by the inverse of the cumulative sum of the shares at K even steps, 1/2K,
3/2K, ...; a significant token is hit several times and counts once, so that fewer than K are left. Only these ask the
attention of the layer; its keys and values are still all tokens (equation 4).

The number of tokens differs from image to image. In a batch every image has K slots; those that stay empty hold copies
that nothing attends to or pools, so images do not depend on their neighbours and shapes not on the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.layers.recorded import fixed
from stvit.models.attention import Attention
from stvit.models.block import Block
from stvit.models.reducers.layerwise import ShareReducer, State, follow, quarter_points, share_of


class ATS(ShareReducer):
    """Adaptive token sampling.

    Args:
        dim: channels C.
        depth: layers of the ViT.
        class_token: whether there is a class token; it always stays.
        keep_rate: K as a share of the image's tokens, rounded up: the most that can stay.
        places: layers (from 0) that sample; None: all from a quarter of the depth on (the paper varies them).
        score: `class`, as in the paper; or, where there is no class token, `attention`: what all tokens take from one.
            None: `class` with a class token.
        trim: leave out slots that no image of the batch fills. The result is the same, in fewer operations; shapes then
            depend on the data.

    Raises:
        ValueError: a share outside (0, 1], impossible places, or an unknown score.
    """

    pools = ("token", "avg", "")

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        class_token: bool,
        keep_rate: float = 0.7,
        places: Sequence[int] | None = None,
        score: str | None = None,
        trim: bool = False,
    ) -> None:
        super().__init__(dim, depth=depth, class_token=class_token)
        self.places = quarter_points(depth, range(depth // 4, depth) if places is None else places)
        self.score = ("class" if class_token else "attention") if score is None else score
        if self.score not in ("class", "attention") or (self.score == "class" and not class_token):
            raise ValueError(
                f"score={self.score!r}: use 'class', which needs class_token=True, or 'attention' (what a token gives "
                "to all others)"
            )
        self.trim = trim
        self.set_rate(keep_rate)

    def layer(self, index: int, block: Block, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Sample before the attention of layer `index` if it is one of the places."""
        mask = None if state.size is None else (state.size > 0)[:, None, None]
        if index not in self.places:
            return block(x, mask=mask), state

        def sample(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal state
            front, tokens = self.prefix, self._count(x)
            real = x.new_ones(x.shape[:2]) if state.size is None else state.size
            share = significance(self.score, q, k, v, block.attn, mask, real, front)
            keep, filled = inverse_samples(
                share, share_of(self.keep_rate, fixed(state.source, 1)[0]), real[:, front:].sum(dim=1)
            )
            if self.trim:
                keep, filled = (one[:, : int(filled.sum(dim=1).max())] for one in (keep, filled))
            order = torch.arange(fixed(keep, 1)[0], device=x.device).expand_as(keep)
            places = keep.new_full((x.shape[0], tokens + 1), -1)  # copies write behind the end
            places = places.scatter(1, torch.where(filled, keep, tokens), order)[:, :tokens]
            size = torch.cat([real[:, :front], filled.to(real.dtype)], dim=1)
            state = state._replace(size=size, source=follow(state.source, places))
            first = torch.arange(front, device=x.device).expand(x.shape[0], -1)
            return torch.cat([first, keep + front], dim=1)

        return block(x, mask=mask, choose=sample), state

    def finish(self, x: Tensor, state: State) -> Tensor:
        """Where the mean is classified: tokens scaled so that it is the mean of those that are there."""
        if state.size is None or self.global_pool != "avg":
            return x
        real = state.size[:, self.prefix :, None]
        scale = (real * (real.shape[1] / real.sum(dim=1, keepdim=True))).to(x.dtype)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :] * scale], dim=1)

    def token_maps(self, x: Tensor, state: State, hw: tuple[int, int]) -> Tensor:
        """As `LayerReducer.token_maps`; slots that hold copies are 0 everywhere."""
        return super().token_maps(x, state, hw).nan_to_num(0.0)

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, places={self.places}, score={self.score!r}"


@torch.no_grad()
def significance(
    kind: str, q: Tensor, k: Tensor, v: Tensor, attention: Attention, mask: Tensor | None, real: Tensor, prefix: int
) -> Tensor:
    """Share of each image token in what the class token (or, `attention`, every token) takes: `(B, T)`, sums to 1.

    Per head `S_j = A_1j |V_j| / sum_i A_1i |V_i|` over image tokens (equation 3), then the mean over heads; float32.

    Args:
        kind: `class` or `attention`.
        q: queries `(B, heads, prefix + T, d)`; likewise keys `k` and values `v`.
        k: keys.
        v: values.
        attention: of the layer.
        mask: of keys, see `Attention`.
        real: `(B, prefix + T)`, 0 where a slot is empty; its query does not count.
        prefix: tokens in front of the image tokens.
    """
    weights = attention.weights(q[:, :, :1] if kind == "class" else q, k, mask)
    weights = weights[:, :, 0] if kind == "class" else (weights * real[:, None, :, None]).sum(dim=2)
    taken = weights[:, :, prefix:] * v[:, :, prefix:].float().norm(dim=-1)
    return (taken / taken.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(taken.dtype).tiny)).mean(dim=1)


@torch.no_grad()
def inverse_samples(share: Tensor, count: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens whose cumulative share lies nearest to 1/2K, 3/2K, ..., (2K-1)/2K for K = `count`.

    Args:
        share: `(B, T)`, sums to 1; empty slots come last and have 0.
        count: K.
        real: `(B,)`, how many slots are not empty.

    Returns:
        Places `(B, K)` in ascending order, every token once, then copies; and which of them are no copies.
    """
    steps = (2 * torch.arange(count, device=share.device) + 1) / (2 * count)
    cumulative = share.cumsum(dim=1)
    last = (real.long() - 1)[:, None]
    above = (cumulative[:, None] < steps[:, None]).sum(dim=2).minimum(last)  # the first that reaches the step
    below = (above - 1).clamp_min(0)
    nearer = (steps - cumulative.gather(1, below)).abs() < (cumulative.gather(1, above) - steps).abs()
    places = torch.where(nearer, below, above)
    first = torch.cat([torch.ones_like(places[:, :1]), places[:, 1:] - places[:, :-1]], dim=1) > 0
    rank = torch.arange(count, device=share.device)
    order = (rank + count * (~first)).argsort(dim=1)  # copies behind, in their order; ONNX has no stable sort
    return places.gather(1, order), first.gather(1, order)
