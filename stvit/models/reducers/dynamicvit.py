"""DynamicViT: learn which tokens to drop (Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token
Sparsification", NeurIPS 2021).

Before a few layers, a small network looks at every image token and at the mean of those still kept, and gives it
probabilities of staying and going. While training, decisions are drawn (Gumbel-softmax with hard values and soft
gradients) and dropped tokens stay in place but are no longer attended, so that gradients reach the decisions. In
evaluation the tokens most likely to stay are taken out of the sequence, a fixed share of them. A loss pulls the share
that is kept while training to the same value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.recorded import fixed
from stvit.models.block import Block
from stvit.models.reducers.layerwise import (
    ShareReducer,
    State,
    follow,
    highest,
    moved,
    quarter_points,
    take,
)

# What a dropped key weighs beside a kept one. Not 0, so that its decision has a gradient.
DROPPED = 1e-6


class KeepPredictor(nn.Module):
    """Log-probabilities of staying and going of every token, from itself and the mean of the kept ones.

    Args:
        dim: channels C, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim={dim}: the keep predictor halves the channels twice, a multiple of 4 is needed")
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens `(B, T, C)` and the decisions so far `(B, T)` (None: all are kept) to `(B, T, 2)`, float32."""
        own, context = self.embed(x).chunk(2, dim=-1)
        if kept is None:
            context = context.mean(dim=1, keepdim=True)
        else:
            kept = kept[..., None].to(context.dtype)
            context = (context * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp_min(1)
        return self.decide(torch.cat([own, context.expand_as(own)], dim=-1)).float().log_softmax(dim=-1)


class DynamicViT(ShareReducer):
    """Learned keep decisions.

    Args:
        dim: channels C.
        depth: layers of the ViT.
        class_token: whether there is a class token; it always stays.
        keep_ratio: decision i (from 1) leaves the share `keep_ratio**i` of all image tokens, rounded down.
        places: layers (from 0) before which decisions are taken; None: a quarter, half, three quarters of the depth.
        ratio_weight: weight of the loss that holds the share.

    Raises:
        ValueError: a ratio outside (0, 1] or impossible places.
    """

    share = "keep_ratio"
    pools = ("token", "avg", "")  # while training, dropped tokens stay in place

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        class_token: bool,
        keep_ratio: float = 0.7,
        places: Sequence[int] | None = None,
        ratio_weight: float = 2.0,
    ) -> None:
        super().__init__(dim, depth=depth, class_token=class_token)
        self.places = quarter_points(depth, places)
        self.ratio_weight = ratio_weight
        self.predictors = nn.ModuleList(KeepPredictor(dim) for _ in self.places)
        self.last_pass: tuple[Tensor, State] | None = None
        self.set_rate(keep_ratio)

    def layer(self, index: int, block: Block, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Decide before layer `index` if it is one of the places; run it on, or with attention on, what is kept."""
        if index in self.places:
            stage = self.places.index(index)
            probability = self.predictors[stage](x[:, self.prefix :], state.kept)
            if self.training:
                state = self._draw(probability, state)
            else:
                at_hand = self._count(x)
                keep = highest(probability[..., 0], self._staying(stage, fixed(state.source, 1)[0], at_hand))
                state = state._replace(source=follow(state.source, moved(keep, at_hand)))
                x = take(x, keep, self.prefix)
        mask = None if state.kept is None else keep_mask(state.kept, self.prefix).to(x.dtype)
        return block(x, mask=mask), state

    def finish(self, x: Tensor, state: State) -> Tensor:
        """In training where the mean is classified: kept tokens scaled so that it is the mean over them."""
        self.last_pass = (x, state) if self.training else None
        if state.kept is None or self.global_pool != "avg":
            return x
        kept = state.kept[..., None]
        scale = (kept * (kept.shape[1] / kept.sum(dim=1, keepdim=True).clamp_min(1))).to(x.dtype)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :] * scale], dim=1) if self.prefix else x * scale

    def auxiliary_losses(self, teacher_tokens: Tensor | None = None, token_weight: float = 0.5) -> dict[str, Tensor]:
        """Terms of the last training pass: `loss_keep_ratio`, and `loss_tokens` where a teacher is given.

        Args:
            teacher_tokens: normalised final tokens `(B, prefix + N, C)` of the full ViT for the same images.
            token_weight: weight of `loss_tokens`.

        Returns:
            Nothing outside training, or when the terms of the last pass were handed out already.
        """
        if self.last_pass is None:
            return {}
        (tokens, state), self.last_pass = self.last_pass, None
        targets = [self.keep_ratio ** (stage + 1) for stage in range(len(state.shares))]
        terms = {"loss_keep_ratio": self.ratio_weight * keep_ratio_loss(state.shares, targets)}
        if teacher_tokens is not None:
            tokens, teacher_tokens = tokens[:, self.prefix :], teacher_tokens[:, self.prefix :]
            terms["loss_tokens"] = token_weight * kept_token_loss(tokens, teacher_tokens, state.kept)
        return terms

    def extra_repr(self) -> str:
        return f"keep_ratio={self.keep_ratio}, places={self.places}"

    def __getstate__(self) -> dict[str, Any]:
        # The last pass belongs to its graph: copies of the model (weight averages, processes) start without it.
        return {**self.__dict__, "last_pass": None}

    def _draw(self, probability: Tensor, state: State) -> State:
        decision = F.gumbel_softmax(probability, hard=True)[..., 0]
        kept = decision if state.kept is None else decision * state.kept
        return state._replace(kept=kept, shares=(*state.shares, kept.mean(dim=1)))

    def _staying(self, stage: int, total: int, at_hand: int) -> int:
        return max(1, min(int(total * self.keep_ratio ** (stage + 1) + 1e-6), at_hand))


def keep_mask(kept: Tensor, prefix: int) -> Tensor:
    """Additive attention mask `(B, 1, T, T)`, T = prefix + N, for decisions `kept` `(B, N)` of 1 and 0.

    Kept tokens and the class token can be attended by all, dropped ones by themselves only. It is differentiable: the
    logarithm of the decision, with `DROPPED` in place of 0.
    """
    if prefix:
        kept = torch.cat([kept.new_ones(kept.shape[0], prefix), kept], dim=1)
    own = torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device)
    weight = kept.float()[:, None, :] * (1 - DROPPED) + DROPPED
    return torch.where(own, 1.0, weight).log()[:, None]


def keep_ratio_loss(shares: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """Mean over decisions and samples of `(share kept - target)**2`; `shares` are `(B,)` per decision. A scalar."""
    terms = [(share.float() - target).square().mean() for share, target in zip(shares, targets, strict=True)]
    return torch.stack(terms).mean()


def kept_token_loss(tokens: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Mean squared difference to the teacher's tokens `(B, N, C)` over kept tokens and channels, in float32.

    `kept` `(B, N)` is 1 where a token is kept. No gradient reaches it or the teacher.
    """
    weight = kept.detach().float()
    difference = (tokens.float() - teacher.detach().float()).square().mean(dim=-1)
    return (difference * weight).sum() / weight.sum().clamp_min(1)
