"""The frame of methods that drop or merge tokens on their way through the ordinary layers of a ViT.

A `SemanticTokenViT` with such a method has the parameters of the full ViT (and the method's own, if any), so weights of
one serve the other. The method sees every layer: `begin`, `layer` for each, `finish`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from core.layers.recorded import fixed
from stvit.models.attention import Attention
from stvit.models.block import Block

SCORES = ("class", "attention", "norm")


class State(NamedTuple):
    """What a method knows about the image tokens at hand (the class token, if any, is not counted).

    Attributes:
        source: `(B, N)` int64: for every image token that came in, which of the tokens at hand it is part of; -1 where
            it was dropped.
        size: `(B, prefix + T)` float32: how many image tokens each token stands for (the class token: itself).
        kept: `(B, N)`: decisions 1 or 0 of a pass in which no token is really removed.
        shares: `(B,)` per decision taken so far: the share of the tokens that it kept.
    """

    source: Tensor
    size: Tensor | None = None
    kept: Tensor | None = None
    shares: tuple[Tensor, ...] = ()


class LayerReducer(nn.Module):
    """Base of the methods; by itself it changes nothing.

    Args:
        dim: channels C.
        depth: layers of the ViT.
        class_token: whether a class token comes first in the sequence; it is never dropped or merged.
    """

    # What may be classified; None: anything.
    pools: tuple[str, ...] | None = None

    def __init__(self, dim: int, *, depth: int, class_token: bool) -> None:
        super().__init__()
        self.dim = dim
        self.depth = depth
        self.prefix = int(class_token)  # with registers more; these, too, always stay
        self.global_pool = "token" if class_token else "avg"

    def read_by(self, global_pool: str) -> None:
        """Be told what is classified: the class token (`token`), or a pooling of the image tokens.

        Raises:
            ValueError: the method leaves tokens in place that only some poolings can leave out (`pools`).
        """
        if global_pool not in (self.pools or (global_pool,)):
            names = " and ".join(repr(name) for name in self.pools if name)
            raise ValueError(
                f"global_pool={global_pool!r} does not go with {type(self).__name__}: dropped tokens stay in place "
                f"there, and only {names} leave them out"
            )
        self.global_pool = global_pool

    def begin(self, x: Tensor) -> State:
        """State before the first layer of tokens `x` `(B, prefix + N, C)`."""
        return State(repeat(torch.arange(self._count(x), device=x.device), "n -> b n", b=x.shape[0]))

    def layer(self, index: int, block: Block, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Layer `index` (from 0): tokens `(B, prefix + T, C)` to as many or fewer, and what became of them."""
        return block(x), state

    def finish(self, x: Tensor, state: State) -> Tensor:
        """Normalised final tokens in the form whose plain mean (or class token) is what is to be classified."""
        return x

    def _count(self, x: Tensor) -> int:
        """Image tokens at hand of tokens `x` `(B, prefix + T, C)`: T."""
        return fixed(x, 1)[0] - self.prefix

    def token_maps(self, x: Tensor, state: State, hw: tuple[int, int]) -> Tensor:
        """Which image tokens each of the tokens `x` `(B, prefix + T, C)` stands for: `(B, T, H, W)`, sums 1 each."""
        tokens = torch.arange(self._count(x), device=x.device)
        member = (state.source[:, None] == tokens[:, None]).float()
        return rearrange(member / member.sum(dim=-1, keepdim=True), "b t (h w) -> b t h w", h=hw[0])

    def auxiliary_losses(self, teacher_tokens: Tensor | None = None, token_weight: float = 0.5) -> dict[str, Tensor]:
        """Loss terms of the last training pass, by name; they are handed out once.

        Args:
            teacher_tokens: normalised final tokens `(B, prefix + N, C)` of the full ViT for the same images; None:
                there is no teacher.
            token_weight: weight of terms that follow the teacher.
        """
        return {}

    # ------------------------------------------------------------------ how much is kept
    def rates(self, tokens: int) -> Sequence[float]:
        """Every setting of `rate` that makes a difference for `tokens` image tokens, in order of rising cost."""
        raise NotImplementedError(f"{type(self).__name__} has no rate")

    def set_rate(self, rate: float) -> None:
        """Choose how much is kept."""
        raise NotImplementedError(f"{type(self).__name__} has no rate")


class ShareReducer(LayerReducer):
    """Base of the methods whose setting is the share of tokens that stays, in (0, 1]."""

    # Its name, as an argument and an attribute.
    share = "keep_rate"

    def set_rate(self, rate: float) -> None:
        """Keep the share `rate`, as the method's argument of that name says.

        Raises:
            ValueError: a rate outside (0, 1].
        """
        setattr(self, self.share, check_share(self.share, rate))

    def rates(self, tokens: int) -> list[float]:
        """Shares in steps below one token: those at which rounding changes in any of several decisions."""
        steps = 4 * tokens
        return [step / steps for step in range(1, steps + 1)]


def quarter_points(depth: int, places: Sequence[int] | None) -> tuple[int, ...]:
    """`places` checked against `depth` layers; None: a quarter, half and three quarters of the depth (3, 6, 9 of 12).

    Raises:
        ValueError: places that do not exist or do not ascend.
    """
    if places is None:
        return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
    places = tuple(places)
    if not places or list(places) != sorted(set(places)) or places[0] < 0 or places[-1] >= depth:
        raise ValueError(f"places={list(places)}: ascending layer numbers from 0 to {depth - 1} are needed")
    return places


def check_share(name: str, value: float) -> float:
    """`value`, if it is a share in (0, 1].

    Raises:
        ValueError: it is not.
    """
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: the share of tokens to keep must be above 0 and at most 1")
    return float(value)


def share_of(share: float, tokens: int) -> int:
    """`share * tokens` rounded up, at least 1; what floating point adds beyond a whole number does not count."""
    return max(1, math.ceil(share * tokens - 1e-6))


def token_scores(kind: str, x: Tensor, q: Tensor, k: Tensor, attention: Attention, prefix: int) -> Tensor:
    """How much each image token matters, `(B, T)` float32.

    Args:
        kind: `class`: the class token's attention on it; `attention`: the mean attention that it gets from all tokens;
            `norm`: its Euclidean length after the attention of this layer. The first two are means over heads.
        x: tokens `(B, prefix + T, C)`.
        q: queries `(B, heads, prefix + T, d)` of this layer.
        k: keys of this layer.
        attention: this layer's attention.
        prefix: tokens in front of the image tokens, the class token first.
    """
    if kind == "norm":
        return x[:, prefix:].float().norm(dim=-1)
    if kind == "class":
        return attention.weights(q[:, :, :1], k).mean(dim=1)[:, 0, prefix:]
    return attention.weights(q, k).mean(dim=(1, 2))[:, prefix:]


def check_score(method: str, kind: str, class_token: bool) -> str:
    """`kind`, if it is a score that can be computed.

    Raises:
        ValueError: unknown, or it needs a class token that is not there.
    """
    if kind not in SCORES:
        raise ValueError(f"unknown score {kind!r}: use one of {', '.join(SCORES)}")
    if kind == "class" and not class_token:
        raise ValueError(
            f"{method} ranks tokens by the class token's attention and this model has none: build it with "
            "class_token=True, or choose score='attention' (what a token gets from all others) or 'norm'"
        )
    return kind


def highest(scores: Tensor, count: int) -> Tensor:
    """Ascending places `(B, count)` of the highest scores `(B, T)`."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def take(x: Tensor, places: Tensor, prefix: int = 0) -> Tensor:
    """The first `prefix` tokens of `x` `(B, prefix + T, C)` and those at `places` `(B, K)` among the others."""
    taken = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]) + prefix)
    return torch.cat([x[:, :prefix], taken], dim=1) if prefix else taken


def moved(keep: Tensor, tokens: int, rest: int = -1) -> Tensor:
    """Where each of `tokens` tokens goes when those at `keep` `(B, K)` stay: `(B, tokens)`, `rest` for the others."""
    places = torch.full((keep.shape[0], tokens), rest, dtype=torch.long, device=keep.device)
    order = torch.arange(fixed(keep, 1)[0], device=keep.device).expand_as(keep)
    return places.scatter(1, keep, order)


def follow(source: Tensor, places: Tensor) -> Tensor:
    """`State.source` after the tokens at hand went to `places` `(B, T)` (-1: dropped)."""
    return torch.where(source < 0, source, places.gather(1, source.clamp_min(0)))
