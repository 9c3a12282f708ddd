"""ToMe: merge the most similar tokens in every layer (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023).

Between the attention and the MLP of a layer, tokens are dealt to two sets in turn. Each token of the first set finds
its most similar token in the second by the cosine of their keys; the r most similar pairs become one token each, the
mean of all image tokens that it stands for. From then on a token of size s counts s times as a key: log s is added to
its attention scores ("proportional attention"). There are no parameters, so a trained ViT can be used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.layers.recorded import fixed
from stvit.models.block import Block
from stvit.models.reducers.layerwise import LayerReducer, State, follow, take


class ToMe(LayerReducer):
    """Token merging.

    Args:
        dim: channels C.
        depth: layers of the ViT.
        class_token: whether there is a class token; it takes no part in merging.
        r: tokens merged away per layer: one number (fractions are spread: 1.5 is 1, 2, 1, 2, ...; no layer can take
            more than half of its tokens), or one whole number per layer.
        inflect: tilt of the schedule: layer numbers go linearly from `r * (1 - inflect)` to `r * (1 + inflect)`; 0 is
            constant, -1 the paper's decreasing schedule, 1 its increasing one.
        proportional: whether attention counts tokens by their size.

    Raises:
        ValueError: negative numbers, a tilt outside [-1, 1], or not one number per layer.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        class_token: bool,
        r: float | Sequence[int] = 13,
        inflect: float = 0.0,
        proportional: bool = True,
    ) -> None:
        super().__init__(dim, depth=depth, class_token=class_token)
        if not -1 <= inflect <= 1:
            raise ValueError(f"inflect={inflect}: -1 (decreasing) to 1 (increasing)")
        self.inflect = inflect
        self.proportional = proportional
        if isinstance(r, int | float):
            self.set_rate(r)
            return
        if len(r) != depth or any(count < 0 or count != int(count) for count in r):
            raise ValueError(f"r={list(r)}: one whole number from 0 on for each of {depth} layers is needed")
        self.merges = [int(count) for count in r]

    def set_rate(self, rate: float) -> None:
        """Merge `rate` tokens per layer on average."""
        if rate < 0:
            raise ValueError(f"r={rate}: the number of tokens to merge per layer must not be negative")
        self.merges = merge_schedule(rate, self.depth, self.inflect)

    def rates(self, tokens: int) -> list[float]:
        """One merge in all, two merges, ... up to halving every layer, backwards."""
        return [total / self.depth for total in range(tokens // 2 * self.depth, -1, -1)]

    def layer(self, index: int, block: Block, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Merge up to `merges[index]` tokens inside layer `index`."""
        r = min(self.merges[index], self._count(x) // 2)
        mask = None
        if self.proportional and state.size is not None:
            mask = state.size.log()[:, None, None].to(x.dtype)
        if not r:
            return block(x, mask=mask), state

        def merge(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
            nonlocal state
            places = bipartite_places(k.mean(dim=1), r, self.prefix)
            size = x.new_ones(x.shape[:2], dtype=torch.float32) if state.size is None else state.size
            x, size = merge_tokens(x, size, places, r)
            state = state._replace(size=size, source=follow(state.source, places[:, self.prefix :] - self.prefix))
            return x

        return block(x, mask=mask, between=merge), state

    def finish(self, x: Tensor, state: State) -> Tensor:
        """Where image tokens are pooled, each gets its merged token back, `(B, prefix + N, C)`: means count sizes."""
        return take(x, state.source, self.prefix) if self.global_pool != "token" else x

    def extra_repr(self) -> str:
        return f"merges={self.merges}, proportional={self.proportional}"


def merge_schedule(r: float, depth: int, inflect: float = 0.0) -> list[int]:
    """Whole numbers per layer whose running sums are those of the (tilted) rate, rounded."""
    tilt = [1 - inflect + 2 * inflect * layer / max(depth - 1, 1) for layer in range(depth)]
    ends = [int(r * sum(tilt[: layer + 1]) + 0.5 + 1e-6) for layer in range(depth)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@torch.no_grad()
def bipartite_places(metric: Tensor, r: int, prefix: int) -> Tensor:
    """Where every token goes when the `r` most similar pairs are merged.

    Tokens at even places are the first set, those at odd places the second. The result is: tokens of the first set that
    stay, in their order, then the second set.

    Args:
        metric: `(B, T, d)`, compared by cosine.
        r: pairs, at most `(T - prefix) // 2`.
        prefix: tokens at the front that stay as they are, at their places.

    Returns:
        `(B, T)` int64 in `[0, T - r)`; both tokens of a pair have the same number.
    """
    metric = F.normalize(metric.float(), dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if prefix > 1:  # the second set has some of them, too
        similarity[:, :, : prefix // 2] = float("-inf")
    similarity, partner = similarity.max(dim=2)
    (tokens,) = fixed(metric, 1)
    front = (prefix + 1) // 2, prefix // 2  # of either set
    protected = torch.arange((tokens + 1) // 2, device=metric.device) < front[0]
    chosen = similarity.masked_fill(protected, float("-inf")).topk(r, dim=1).indices
    merged = torch.zeros_like(similarity).scatter(1, chosen, 1.0) > 0
    staying = (tokens + 1) // 2 - r
    first = torch.where(merged, partner + staying, (~merged).long().cumsum(dim=1) - 1)
    second = staying + torch.arange(tokens // 2, device=metric.device).expand(metric.shape[0], -1)
    # In turns: the first set has the even places.
    order = torch.arange(tokens, device=metric.device)
    places = torch.cat([first, second], dim=1)[:, order // 2 + order % 2 * ((tokens + 1) // 2)]
    if prefix < 2:
        return places
    # What stays of the first set makes room for the second set's tokens at the front.
    places = torch.where((places >= front[0]) & (places < staying), places + front[1], places)
    return torch.cat([order[:prefix].expand(metric.shape[0], -1), places[:, prefix:]], dim=1)


def merge_tokens(x: Tensor, size: Tensor, places: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Means of the tokens `x` `(B, T, C)` that share a place, weighted by `size` `(B, T)`; and the sums of their sizes.

    Sums are taken in float32. Returns `(B, T - r, C)` and `(B, T - r)`.
    """
    batch, (tokens, channels) = x.shape[0], fixed(x, 1, 2)
    total = size.new_zeros(batch, tokens - r).scatter_add(1, places, size)
    weighted = x.float() * size[..., None]
    summed = weighted.new_zeros(batch, tokens - r, channels).scatter_add(
        1, places[..., None].expand(-1, -1, channels), weighted
    )
    return (summed / total[..., None]).to(x.dtype), total
