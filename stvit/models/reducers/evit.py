"""EViT: keep what the class token attends to, fuse the rest (Liang et al., "Not All Patches Are What You Need",
ICLR 2022), and its plainest relative, which drops the rest.

At a few layers, between attention and MLP, image tokens are ranked by the class token's attention on them (mean over
heads). The best ones stay; the others become one token, their sum weighted by that attention. The fused token is an
image token like any other from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stvit.models.block import Block
from stvit.models.reducers.layerwise import (
    ShareReducer,
    State,
    check_score,
    follow,
    highest,
    moved,
    quarter_points,
    share_of,
    take,
    token_scores,
)


class EViT(ShareReducer):
    """Attentive tokens stay, inattentive ones are fused.

    Args:
        dim: channels C.
        depth: layers of the ViT.
        class_token: whether there is a class token.
        keep_rate: share of the image tokens at hand that stays at each of `places`, rounded up.
        places: layers (from 0) that reduce; None: a quarter, half and three quarters of the depth.
        score: what ranks the tokens: `class`, or, where there is no class token, `attention` or `norm`; see
            `token_scores`. Scores other than `class` weigh the fused token by their shares among the fused ones.
        fuse: False drops the inattentive tokens.

    Raises:
        ValueError: a rate outside (0, 1], impossible places, or a score that needs a class token.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        class_token: bool,
        keep_rate: float = 0.7,
        places: Sequence[int] | None = None,
        score: str = "class",
        fuse: bool = True,
    ) -> None:
        super().__init__(dim, depth=depth, class_token=class_token)
        self.places = quarter_points(depth, places)
        self.score = check_score(type(self).__name__, score, class_token)
        self.fuse = fuse
        self.set_rate(keep_rate)

    def layer(self, index: int, block: Block, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Reduce inside layer `index` if it is one of the places."""
        tokens = self._count(x)
        count = share_of(self.keep_rate, tokens)
        if index not in self.places or count == tokens:
            return block(x), state

        def keep_best(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
            nonlocal state
            scores = token_scores(self.score, x, q, k, block.attn, self.prefix)
            keep = highest(scores, count)
            places = moved(keep, tokens, rest=count if self.fuse else -1)
            state = state._replace(source=follow(state.source, places))
            kept = take(x, keep, self.prefix)
            if not self.fuse:
                return kept
            weights = scores.scatter(1, keep, 0.0)
            if self.score != "class":
                weights = weights / weights.sum(dim=1, keepdim=True)
            fused = weights[:, None].to(x.dtype) @ x[:, self.prefix :]
            return torch.cat([kept, fused], dim=1)

        return block(x, between=keep_best), state

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, places={self.places}, score={self.score!r}, fuse={self.fuse}"


class TopK(EViT):
    """The best tokens stay, the others are dropped: `EViT` without fusing.

    Args:
        dim: channels C.
        depth: layers of the ViT.
        class_token: whether there is a class token.
        keep_rate: share of the tokens at hand that stays at each of `places`, rounded up.
        places: layers (from 0) that reduce; None: a quarter, half and three quarters of the depth.
        score: see `token_scores`; None: `class` with a class token, `norm` without.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        class_token: bool,
        keep_rate: float = 0.7,
        places: Sequence[int] | None = None,
        score: str | None = None,
    ) -> None:
        score = ("class" if class_token else "norm") if score is None else score
        super().__init__(
            dim, depth=depth, class_token=class_token, keep_rate=keep_rate, places=places, score=score, fuse=False
        )
