"""STViT-DeiT: a plain ViT that goes on with semantic tokens after its base layers (section 3.2 of the STViT paper).

    image -> stem + position -> base layers on all N tokens -> reducer: N tokens to S -> tail layers -> mean -> classes

`tokens` chooses the reducer. Everything else stays the same, so the full ViT and the controls are one argument away.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_
from torch.utils.checkpoint import checkpoint

from stvit.models.block import block_stack
from stvit.models.controls import AllTokens, PooledTokens, RandomTokens
from stvit.models.stem import build_stem
from stvit.models.tokens import SemanticTokenGenerator

TOKENS = ("semantic", "all", "pooled", "random")


class SemanticTokenViT(nn.Module):
    """ViT whose layers after `base_depth` work on `token_grid` semantic tokens; their mean is classified.

    The defaults are the paper's STViT-DeiT-S: 4 base layers on 196 tokens, 2 generation layers, 6 layers on 16 tokens.

    Args:
        img_size: height and width in pixels (or one number for both) that the position embedding is made for; images of
            other sizes are accepted and get a resampled one.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        num_classes: number of classes; 0 leaves out the classifier, and `forward` returns features.
        embed_dim: channels C of the tokens.
        depth: layers in all.
        num_heads: attention heads.
        base_depth: layers on all image tokens.
        stgm_depth: generation layers; `depth - base_depth - stgm_depth` layers follow on the semantic tokens.
        token_grid: `(height, width)` of the semantic tokens, or one number for a square.
        tokens: what goes on after the base layers: `semantic`; `all` (the full ViT); `pooled` (pooled centres without
            generation); `random` (as many randomly kept image tokens).
        pool: initial centres: `max`, `avg`, `weighted`, `weighted_offset`, or `none` (global centres only).
        use_global: learned global centres G added in the second generation layer.
        global_in: `query` or `key`, see `SemanticTokenGenerator`.
        shortcut: residual of the first generation layer.
        mlp_ratio: hidden width of the MLPs in units of C.
        qkv_bias: bias in query and key/value projections.
        layer_scale: initial value of per-channel scales of residual branches; None for none.
        class_token: classify a class token instead of the mean; only with `tokens="all"`, which then is DeiT itself.
        stem: `patch` (one projection) or `conv` (3x3 convolutions of stride 2).
        drop_rate: dropout before the classifier, after attention projections and in MLPs.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        norm_eps: epsilon of layer norms.

    Raises:
        ValueError: unknown option or impossible depths.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        base_depth: int = 4,
        stgm_depth: int = 2,
        token_grid: int | tuple[int, int] = 4,
        tokens: str = "semantic",
        pool: str = "weighted_offset",
        use_global: bool = True,
        global_in: str = "query",
        shortcut: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        class_token: bool = False,
        stem: str = "patch",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if base_depth < 0 or stgm_depth < 1 or base_depth + stgm_depth > depth:
            raise ValueError(
                f"base_depth={base_depth} and stgm_depth={stgm_depth} do not fit into depth={depth} layers: "
                "they must be >= 0 and >= 1 and at most depth together"
            )
        if class_token and tokens != "all":
            raise ValueError(f"class_token=True goes with tokens='all' only: tokens={tokens!r} averages its tokens")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.token_grid = (token_grid, token_grid) if isinstance(token_grid, int) else tuple(token_grid)
        self.grad_checkpointing = False

        self.stem = build_stem(stem, patch_size, in_chans, embed_dim)
        self.grid = self.stem.grid(height, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, class_token + self.grid[0] * self.grid[1], embed_dim))

        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        generated = base_depth + stgm_depth
        block = dict(
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            attn_drop=attn_drop_rate,
            proj_drop=drop_rate,
            norm_eps=norm_eps,
        )
        layers = dict(depth=stgm_depth, drop_path=rates[base_depth:generated], **block)
        self.base = block_stack(embed_dim, num_heads, rates[:base_depth], **block)
        if tokens == "semantic":
            self.reducer = SemanticTokenGenerator(
                embed_dim,
                num_heads,
                grid=self.token_grid,
                pool=pool,
                use_global=use_global,
                global_in=global_in,
                shortcut=shortcut,
                **layers,
            )
        elif tokens == "all":
            self.reducer = AllTokens(embed_dim, num_heads, **layers)
        elif tokens == "pooled":
            self.reducer = PooledTokens(embed_dim, num_heads, grid=self.token_grid, pool=pool, **layers)
        elif tokens == "random":
            self.reducer = RandomTokens(
                embed_dim, num_heads, num_tokens=self.token_grid[0] * self.token_grid[1], **layers
            )
        else:
            raise ValueError(f"unknown tokens {tokens!r}: use one of {', '.join(TOKENS)}")
        self.tail = block_stack(embed_dim, num_heads, rates[generated:], **block)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers, position, learned tokens: truncated normal of deviation .02; biases 0; the rest as PyTorch."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    zeros_(module.bias)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, in_chans, H, W)`.

        `generator` chooses the kept tokens of `tokens="random"`; see `RandomTokens`.
        """
        return self.forward_head(self.forward_features(images, generator))

    def forward_features(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised final tokens `(B, S, C)` (`(B, N, C)` with `tokens="all"`).

        Raises:
            ValueError: a generator was given to a model without random choices.
        """
        x, hw = self.forward_base(images)
        if isinstance(self.reducer, RandomTokens):
            x = self.reducer(x, hw, generator)
        elif generator is not None:
            raise ValueError("generator= is for tokens='random'; this model makes no random choice")
        else:
            x = self._call(self.reducer, x, hw)
        for layer in self.tail:
            x = self._call(layer, x)
        return self.norm(x)

    def forward_base(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image tokens after the base layers, `(B, H'*W', C)` in raster order, and their grid `(H', W')`.

        A class token, if there is one, comes first.
        """
        tokens = self.stem(images)
        hw = (tokens.shape[2], tokens.shape[3])
        x = rearrange(tokens, "b c h w -> b (h w) c")
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self._position(hw)
        for layer in self.base:
            x = self._call(layer, x)
        return x, hw

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean of the tokens `(B, S, C)` (or the class token), then the classifier unless `pre_logits`."""
        x = x.mean(dim=1) if self.cls_token is None else x[:, 0]
        return x if pre_logits else self.head(self.head_drop(x))

    def token_maps(self, images: Tensor) -> Tensor:
        """Where each semantic token looks: `(B, S, H', W')` on the grid of image tokens, every map sums to 1.

        The mean attention of the last generation layer on image tokens; enlarge it to the image by interpolation.

        Raises:
            ValueError: the model has no semantic tokens.
        """
        if not isinstance(self.reducer, SemanticTokenGenerator):
            raise ValueError("token maps are the attention of semantic tokens: build the model with tokens='semantic'")
        return self.reducer.token_maps(*self.forward_base(images))

    def get_classifier(self) -> nn.Module:
        """The final linear layer (identity when there are no classes)."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for `num_classes` (0: none).

        Raises:
            ValueError: a pooling other than the mean is asked for.
        """
        if global_pool not in (None, "avg" if self.cls_token is None else "token"):
            raise ValueError(f"global_pool={global_pool!r}: what is classified is fixed by class_token at construction")
        self.num_classes = num_classes
        reference = self.norm.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes, device=reference.device, dtype=reference.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that are not decayed."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Parameter groups from stem to tail for timm's layer-wise tools, one per layer unless `coarse`."""
        if coarse:
            return dict(stem=r"^stem|^pos_embed|^cls_token", base=r"^base", generation=r"^reducer", tail=r"^tail|^norm")
        return dict(
            stem=r"^stem|^pos_embed|^cls_token",
            base=r"^base\.(\d+)",
            # Pooling and global centres belong to the first generation layer.
            generation=[(r"^reducer\.layers\.(\d+)", None), (r"^reducer\.", (0,))],
            tail=r"^tail\.(\d+)",
            # 99999 is timm's mark for "same group as the one before".
            norm=[(r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def _call(self, module: nn.Module, *inputs: object) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def _position(self, hw: tuple[int, int]) -> Tensor:
        if hw == self.grid:
            return self.pos_embed
        prefix = int(self.cls_token is not None)
        return resample_abs_pos_embed(self.pos_embed, list(hw), list(self.grid), num_prefix_tokens=prefix)


def stvit_deit_tiny(**options: object) -> SemanticTokenViT:
    """STViT-DeiT-T: 192 channels, 3 heads, 12 layers; `options` as in `SemanticTokenViT`."""
    return SemanticTokenViT(**(dict(embed_dim=192, num_heads=3) | options))


def stvit_deit_small(**options: object) -> SemanticTokenViT:
    """STViT-DeiT-S: 384 channels, 6 heads, 12 layers; `options` as in `SemanticTokenViT`."""
    return SemanticTokenViT(**(dict(embed_dim=384, num_heads=6) | options))


def stvit_deit_base(**options: object) -> SemanticTokenViT:
    """STViT-DeiT-B: 768 channels, 12 heads, 12 layers; `options` as in `SemanticTokenViT`."""
    return SemanticTokenViT(**(dict(embed_dim=768, num_heads=12) | options))
