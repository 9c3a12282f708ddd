"""LV-ViT (Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021,
arXiv 2104.10858), and semantic tokens on it.

It is a ViT with more and narrower layers, a convolutional stem, residual branches that are divided by 2, and a second
classifier: while training, every image token has a label of its own; afterwards the highest token's logits are added to
half their value.

What STViT's supplement does on LV-ViT is not public but for two figures: 36 tokens, 0.6 points of top-1 less. Here the
first third of the layers sees all tokens, as in STViT-DeiT, and the mean of the semantic tokens is classified: clusters
have no place that a label of a token belongs to.
"""

from __future__ import annotations

from torch import Tensor, nn

from stvit.models.vit import SemanticTokenViT, init_linear


class LVViT(SemanticTokenViT):
    """LV-ViT, by default LV-ViT-S with all tokens.

    Args:
        img_size: see `SemanticTokenViT`.
        patch_size: likewise, even.
        in_chans: likewise.
        num_classes: likewise.
        embed_dim: likewise.
        depth: likewise.
        num_heads: likewise.
        base_depth: layers on all tokens, of models with semantic tokens; None: a third of `depth`, as in STViT-DeiT.
        token_grid: grid of the semantic tokens; 6 x 6 are the supplement's 36.
        tokens: likewise; without semantic tokens, a class token is classified.
        token_head: whether there is a classifier of tokens, whose maximum counts half. None: where it is possible.
        mlp_ratio: see `SemanticTokenViT`.
        qkv_bias: likewise.
        residual_scale: likewise; the authors divide by `skip_lam`, 2 in LV-ViT-S and -M.
        stem: likewise.
        norm_eps: likewise.
        options: further arguments of `SemanticTokenViT`.

    Raises:
        ValueError: a classifier of tokens without a class token, of clusters (semantic and pooled tokens), or where
            dropped tokens stay in place (`dynamicvit`, `ats`); see also `SemanticTokenViT`.

    `token_training` has `forward` give the logits of tokens, too, while training; `stvit.TokenLabelTrainer` sets it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        *,
        base_depth: int | None = None,
        token_grid: int | tuple[int, int] = 6,
        tokens: str = "all",
        token_head: bool | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        residual_scale: float = 0.5,
        stem: str = "half_conv",
        norm_eps: float = 1e-5,
        **options: object,
    ) -> None:
        options.setdefault("class_token", tokens != "semantic")
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            embed_dim,
            depth,
            num_heads,
            base_depth=depth // 3 if base_depth is None else base_depth,
            token_grid=token_grid,
            tokens=tokens,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            residual_scale=residual_scale,
            stem=stem,
            norm_eps=norm_eps,
            **options,
        )
        in_place = self.reduction is not None and self.reduction.pools is not None
        possible = self.has_class_token and tokens != "pooled" and not in_place
        token_head = possible if token_head is None else token_head
        if token_head and not possible:
            raise ValueError(
                f"token_head=True does not go with tokens={tokens!r}, class_token={self.has_class_token}: it adds the "
                "highest logits of image tokens to the class token's, and these are clusters or hold places of dropped "
                "tokens"
            )
        self.token_training = False
        self.aux_head: nn.Module | None = None
        if token_head:
            self.aux_head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
            init_linear(self.aux_head)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the final tokens `(B, N, C)`; in evaluation with half the highest of the tokens' logits.

        In training with `token_training`, the class token's logits `(B, num_classes)` and those of every image token
        `(B, N, num_classes)`.
        """
        logits = super().forward_head(x, pre_logits)
        labels_tokens = self.aux_head is not None and self.num_classes > 0 and self.global_pool == "token"
        if pre_logits or not labels_tokens or (self.training and not self.token_training):
            return logits
        tokens = self.aux_head(x[:, self.num_prefix_tokens :])
        return (logits, tokens) if self.training else logits + 0.5 * tokens.amax(dim=1)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The final linear layer, with that of tokens where there is one."""
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """See `TokenClassifier.reset_classifier`; the classifier of tokens is replaced, too."""
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = self._fresh_head()


def lvvit_small(**options: object) -> LVViT:
    """LV-ViT-S: 384 channels, 6 heads, 16 layers; `options` as in `LVViT`."""
    return LVViT(**(dict(embed_dim=384, depth=16, num_heads=6) | options))


def lvvit_medium(**options: object) -> LVViT:
    """LV-ViT-M: 512 channels, 8 heads, 20 layers; `options` as in `LVViT`."""
    return LVViT(**(dict(embed_dim=512, depth=20, num_heads=8) | options))


def stvit_lvvit_small(**options: object) -> LVViT:
    """LV-ViT-S with 36 semantic tokens after 5 of its 16 layers; `options` as in `LVViT`."""
    return lvvit_small(**(dict(tokens="semantic") | options))


def stvit_lvvit_medium(**options: object) -> LVViT:
    """LV-ViT-M with 36 semantic tokens after 6 of its 20 layers; `options` as in `LVViT`."""
    return lvvit_medium(**(dict(tokens="semantic") | options))
