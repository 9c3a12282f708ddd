"""Pooling and classifier of final tokens, as timm's models have them: shared by ViTs and models with stages."""

from __future__ import annotations

from timm.layers import global_pool_nlc
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_

GLOBAL_POOLS = ("", "avg", "avgmax", "max", "token", "map")


class TokenClassifier(nn.Module):
    """Final tokens `(B, N, C)` to logits: timm's `global_pool`, `forward_head`, `reset_classifier` and their relatives.

    Subclasses call `build_classifier`, and have `num_prefix_tokens` in front of the image tokens that are pooled.
    """

    num_prefix_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.attn_pool: nn.Module | None = None
        self.head_dist: nn.Module | None = None

    def build_classifier(self, dim: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Makes `head_drop` and `head`.

        Args:
            dim: channels C.
            num_classes: number of classes; 0: none, pooled tokens come out.
            global_pool: `avg`, `max`, `avgmax` (their mean), `token` (the class token), `map` (attention pooling by
                `attn_pool`), or empty: tokens are not pooled, and each is classified.
            drop_rate: dropout before the classifier.

        Raises:
            ValueError: a pooling that there is not, or that this model has no part for.
        """
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim
        self.set_global_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def set_global_pool(self, global_pool: str) -> None:
        """Choose what is classified, see `build_classifier`."""
        if global_pool not in GLOBAL_POOLS:
            raise ValueError(f"unknown global_pool {global_pool!r}: use one of {', '.join(map(repr, GLOBAL_POOLS))}")
        if global_pool == "token" and not self.has_class_token:
            raise ValueError("global_pool='token' needs a class token, and this model has none (class_token=True)")
        if global_pool == "map" and self.attn_pool is None:
            raise ValueError("global_pool='map' needs attention pooling, which only a ViT built with it has")
        self.global_pool = global_pool

    @property
    def has_class_token(self) -> bool:
        """Whether a class token leads the final tokens."""
        return False

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Final tokens `(B, N, C)` to what is classified, `(B, C)`; or as they are, where nothing pools them."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "map":
            return self.attn_pool(x[:, self.num_prefix_tokens :])
        return global_pool_nlc(x, pool_type, self.num_prefix_tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the final tokens `(B, N, C)`, or with `pre_logits` what the classifier reads, `(B, C)`.

        A distilled model classifies two tokens; in evaluation the mean is the answer, as DeiT's.
        """
        if self.head_dist is not None and self.global_pool == "token":
            both = self.head_drop(x[:, :2])
            if pre_logits:
                return both.mean(dim=1)
            logits = self.head(both[:, 0]), self.head_dist(both[:, 1])
            return logits if self.training and self.distilled_training else (logits[0] + logits[1]) / 2
        x = self.head_drop(self.after_pool(self.pool(x)))
        return x if pre_logits else self.head(x)

    def after_pool(self, x: Tensor) -> Tensor:
        """Between pooling and classifier."""
        return x

    def get_classifier(self) -> nn.Module:
        """The final linear layer (identity when there are no classes); of a distilled model both, as timm has it."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for `num_classes` (0: none).

        Args:
            num_classes: number of classes.
            global_pool: see `build_classifier`; None: as it is.

        Raises:
            ValueError: a pooling that there is not, or that this model has no part for.
        """
        if global_pool is not None:
            self.set_global_pool(global_pool)
            if global_pool != "map":
                self.attn_pool = None
        self.num_classes = num_classes
        self.head = self._fresh_head()
        if self.head_dist is not None:
            self.head_dist = self._fresh_head()

    def _fresh_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        like = next(self.parameters())
        head = nn.Linear(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(head.weight, std=0.02)
        zeros_(head.bias)
        return head.train(self.training)
