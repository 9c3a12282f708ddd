"""STViT-DeiT: a plain ViT that goes on with semantic tokens after its base layers (section 3.2 of the STViT paper).

    image -> stem + position -> base layers on all N tokens -> reducer: N tokens to S -> tail layers -> mean -> classes

`tokens` chooses the reducer, or a method that works inside all layers (`stvit.models.reducers`). Everything else stays
the same, so the full ViT, the controls and the field's other methods are one argument away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import AttentionPoolLatent, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_
from torch.utils.checkpoint import checkpoint

from core.layers.recorded import fixed
from stvit.models.block import activation, block_stack
from stvit.models.controls import AllTokens, RandomTokens
from stvit.models.derived import constant
from stvit.models.reducers import State, build_reducer, match_macs, on_meta
from stvit.models.stem import build_stem
from stvit.models.tokens import SemanticTokenGenerator
from stvit.models.vit_features import ViTFeatures

TOKEN_POSITIONS = ("none", "learned", "conv", "relative")


class SemanticTokenViT(ViTFeatures):
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
            generation); `random` (as many randomly kept image tokens). Or a method that reduces tokens all along the
            full ViT, with the parameters of `all`: `tome`, `evit`, `topk`, `dynamicvit`, `ats`.
        token_options: further arguments of that method, e.g. `{"r": 13}` for `tome`; see `stvit.models.reducers`.
        macs: choose how much the method keeps so that an image of `img_size` costs this many multiply-accumulates
            (within 1 %), instead of `token_grid` or the method's own argument; not with `semantic` and `all`.
        pool: initial centres: `max`, `avg`, `weighted`, `weighted_offset`, or `none` (global centres only).
        use_global: learned global centres G added in the second generation layer.
        global_in: `query` or `key`, see `SemanticTokenGenerator`.
        shortcut: residual of the first generation layer.
        token_position: of semantic tokens: `none`; `learned` or `conv`, see `SemanticTokenGenerator`; or `relative`, a
            learned bias in the layers behind generation.
        mlp_ratio: hidden width of the MLPs in units of C.
        qkv_bias: bias in query and key/value projections.
        layer_scale: initial value of per-channel scales of residual branches; None for none.
        residual_scale: factor of residual branches instead, see `Block`.
        class_token: classify a class token instead of the mean, as DeiT does; not with `tokens="semantic"`.
        reg_tokens: further learned tokens in front of the image tokens, which no method drops or merges; semantic
            tokens are generated without them.
        distilled: the first of them is a distillation token with a classifier of its own, as in distilled DeiT.
        no_embed_class: positions are of image tokens alone, tokens in front have none.
        pre_norm: a norm before the layers and none of the patch projection's biases, as in CLIP.
        final_norm: False leaves out the norm behind the layers.
        fc_norm: whether that norm comes after pooling instead.
        global_pool: what is classified: `avg`, `max`, `avgmax`, `token` (the class token), `map` (attention pooling, as
            in SigLIP), or empty (every token by itself; with `num_classes=0`, `forward` returns tokens). None: the
            class token, where there is one, else the mean.
        act_layer: activation of the MLPs: timm's name of one, or a class; `gelu` is the exact GELU.
        stem: `patch` (one projection), `conv` (3x3 convolutions of stride 2) or `half_conv` (see `HalfConvStem`).
        drop_rate: dropout before the classifier, after attention projections and in MLPs.
        proj_drop_rate: of the latter two; None: `drop_rate`.
        pos_drop_rate: dropout of tokens with their position.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        norm_eps: epsilon of layer norms.

    Raises:
        ValueError: unknown option, impossible depths, or a cost that cannot be reached.
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
        token_position: str = "none",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        residual_scale: float = 1.0,
        class_token: bool = False,
        reg_tokens: int = 0,
        distilled: bool = False,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool = False,
        global_pool: str | None = None,
        act_layer: str | Callable[[], nn.Module] = "gelu",
        stem: str = "patch",
        drop_rate: float = 0.0,
        proj_drop_rate: float | None = None,
        pos_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        token_options: Mapping[str, object] | None = None,
        macs: float | None = None,
    ) -> None:
        super().__init__()
        if base_depth < 0 or stgm_depth < 1 or base_depth + stgm_depth > depth:
            raise ValueError(
                f"base_depth={base_depth} and stgm_depth={stgm_depth} do not fit into depth={depth} layers: "
                "they must be >= 0 and >= 1 and at most depth together"
            )
        if class_token and tokens == "semantic":
            raise ValueError(
                "class_token=True does not go with tokens='semantic', whose tokens are averaged: choose a method that "
                "keeps image tokens, or tokens='all'"
            )
        if distilled and not (class_token and reg_tokens):
            raise ValueError("distilled=True classifies two tokens: set class_token=True and reg_tokens=1")
        if token_position not in TOKEN_POSITIONS:
            raise ValueError(f"unknown token_position {token_position!r}: use one of {', '.join(TOKEN_POSITIONS)}")
        if token_position != "none" and tokens != "semantic":
            raise ValueError(
                f"token_position={token_position!r} is a position of semantic tokens: use token_position='none' with "
                f"tokens={tokens!r}"
            )
        if token_position == "relative" and base_depth + stgm_depth == depth:
            raise ValueError(
                "token_position='relative' is a bias in the layers behind generation, and there are none: use a depth "
                "above base_depth + stgm_depth, or another position"
            )
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.no_embed_class = no_embed_class
        self.token_grid = (token_grid, token_grid) if isinstance(token_grid, int) else tuple(token_grid)
        self.grad_checkpointing = False

        self.stem = build_stem(stem, patch_size, in_chans, embed_dim, bias=not pre_norm)
        self.grid = self.stem.grid(height, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        length = self.position_prefix + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        norm = partial(nn.LayerNorm, embed_dim, eps=norm_eps)
        self.norm_pre = norm() if pre_norm else nn.Identity()

        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        generated = base_depth + stgm_depth
        block = dict(
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            residual_scale=residual_scale,
            attn_drop=attn_drop_rate,
            proj_drop=drop_rate if proj_drop_rate is None else proj_drop_rate,
            norm_eps=norm_eps,
            act_layer=act_layer,
        )
        relative = token_position == "relative"
        self.base = block_stack(embed_dim, num_heads, rates[:base_depth], **block)
        self.reducer, self.reduction = build_reducer(
            tokens,
            embed_dim,
            num_heads,
            layers=dict(depth=stgm_depth, drop_path=rates[base_depth:generated], **block),
            centres=dict(grid=self.token_grid, pool=pool),
            generation=dict(
                use_global=use_global,
                global_in=global_in,
                shortcut=shortcut,
                position="none" if relative else token_position,
            ),
            method=dict(depth=depth, class_token=class_token, registers=reg_tokens),
            options=token_options or {},
        )
        self.tail = block_stack(
            embed_dim, num_heads, rates[generated:], relative_window=self.token_grid if relative else None, **block
        )
        self.norm = norm() if final_norm and not fc_norm else nn.Identity()
        if global_pool == "map":
            self.attn_pool = AttentionPoolLatent(
                embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                norm_layer=partial(nn.LayerNorm, eps=norm_eps),
                act_layer=activation(act_layer),
            )
        self.fc_norm = norm() if final_norm and fc_norm else nn.Identity()
        default = "token" if class_token else "avg"
        self.build_classifier(embed_dim, num_classes, default if global_pool is None else global_pool, drop_rate)
        if distilled:
            self.distilled_training = False
            self.head_dist = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
            self.set_global_pool(self.global_pool)
        self.init_weights()
        if macs is not None:
            self.match_macs(macs)

    @property
    def prefix(self) -> int:
        """How many tokens stand in front of the image tokens."""
        return sum(token.shape[1] for token in (self.cls_token, self.reg_token) if token is not None)

    @property
    def position_prefix(self) -> int:
        """How many of them have a position."""
        return 0 if self.no_embed_class else self.prefix

    @property
    def num_prefix_tokens(self) -> int:
        """How many of them are left in front of the final tokens."""
        return 0 if isinstance(self.reducer, SemanticTokenGenerator) else self.prefix

    @property
    def has_class_token(self) -> bool:
        """Whether a class token leads the final tokens."""
        return self.cls_token is not None

    def set_global_pool(self, global_pool: str) -> None:
        """Choose what is classified, see `TokenClassifier.build_classifier`.

        Raises:
            ValueError: a pooling that this model has no part for, or that its method of reduction forbids.
        """
        if self.head_dist is not None and global_pool not in ("", "token"):
            raise ValueError(f"global_pool={global_pool!r}: a distilled model classifies its two tokens, 'token'")
        super().set_global_pool(global_pool)
        if self.reduction is not None:
            self.reduction.read_by(global_pool)

    def init_weights(self) -> None:
        """Linear layers, position, learned tokens: truncated normal of deviation .02; biases 0; the rest as PyTorch."""
        trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                trunc_normal_(token, std=0.02)
        init_linear(self)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, in_chans, H, W)`.

        `generator` chooses the kept tokens of `tokens="random"`; see `RandomTokens`.
        """
        return self.forward_head(self.forward_features(images, generator))

    def forward_features(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised final tokens: `(B, S, C)`, or `(B, N, C)` with `tokens="all"`; after those in front, if any.

        Of methods that reduce all along the way it is what they leave, in a form whose plain mean is to be classified:
        without a class token `tome` gives every image token its merged token back, `(B, N, C)`.

        Raises:
            ValueError: a generator was given to a model without random choices.
        """
        if generator is not None and not isinstance(self.reducer, RandomTokens):
            raise ValueError("generator= is for tokens='random'; this model makes no random choice")
        if self.reduction is not None:
            x, state, _ = self._forward_reduced(images)
            return self.reduction.finish(self.norm(x), state)
        x, hw = self.forward_base(images)
        if generator is not None:
            x = self.reducer(x, hw, generator)
        else:
            x = self._call(self.reducer, x, hw)
        for layer in self.tail:
            x = self._call(layer, x)
        return self.norm(x)

    def forward_base(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image tokens after the base layers, `(B, H'*W', C)` in raster order, and their grid `(H', W')`.

        Tokens in front (class token, registers) come first. Methods that reduce all along the way are not at work here.
        """
        x, hw = self.forward_stem(images)
        for layer in self.base:
            x = self._call(layer, x)
        return x, hw

    def forward_stem(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image tokens with their position, `(B, H'*W', C)`, after the tokens in front of them; and their grid."""
        tokens = self.stem(images)
        hw = fixed(tokens, 2, 3)
        x = rearrange(tokens, "b c h w -> b (h w) c")
        first = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = x + self._position(hw) if self.no_embed_class else x
        x = torch.cat([*first, x], dim=1) if first else x
        x = x if self.no_embed_class else x + self._position(hw)
        return self.norm_pre(self.pos_drop(x)), hw

    def after_pool(self, x: Tensor) -> Tensor:
        """The norm behind pooling, of models that have theirs there."""
        return self.fc_norm(x)

    def token_maps(self, images: Tensor) -> Tensor:
        """What each remaining token is made of: `(B, S, H', W')` on the grid of image tokens, every map sums to 1.

        Of semantic tokens it is where they look: the mean attention of the last generation layer on image tokens. Of
        tokens that a method kept or merged all along the way, the image tokens in them, evenly. Enlarge it to the image
        by interpolation.

        Raises:
            ValueError: nothing is reduced, or by a method that leaves no trace.
        """
        if self.reduction is not None:
            x, state, hw = self._forward_reduced(images)
            return self.reduction.token_maps(x, state, hw)
        if not isinstance(self.reducer, SemanticTokenGenerator):
            raise ValueError(
                "token maps are the attention of semantic tokens or the members of merged and kept ones: build the "
                "model with tokens='semantic' or a method such as 'tome'"
            )
        return self.reducer.token_maps(*self.forward_base(images))

    def remaining_tokens(self) -> int:
        """Tokens behind the last layer of an image of `img_size` in evaluation, a class token not counted."""
        if self.reduction is None:
            return self.grid[0] * self.grid[1] if type(self.reducer) is AllTokens else self.reducer.num_tokens
        with torch.no_grad():
            tokens = self.prefix + self.grid[0] * self.grid[1]
            x, _ = on_meta(self)._reduced(self.pos_embed.new_empty(1, tokens, self.embed_dim, device="meta"))
        return x.shape[1] - self.reduction.prefix

    def auxiliary_losses(self, teacher_tokens: Tensor | None = None, token_weight: float = 0.5) -> dict[str, Tensor]:
        """Loss terms of the last training pass besides the classifier's, by name (only `dynamicvit` has any).

        They are handed out once: call it after every training pass.

        Args:
            teacher_tokens: what `forward_features` of the full ViT gives for the same images, for terms that follow it.
            token_weight: weight of these terms.
        """
        return {} if self.reduction is None else self.reduction.auxiliary_losses(teacher_tokens, token_weight)

    def match_macs(self, macs: float) -> None:
        """Choose how much the method keeps so that an image of `img_size` costs `macs` multiply-accumulates.

        Raises:
            ValueError: the method has nothing to choose, or no choice comes within 1 %.
        """
        method = self.reducer if self.reduction is None else self.reduction
        if not hasattr(method, "set_rate"):
            raise ValueError(
                f"macs={macs:.4g}: {type(method).__name__} has no rate to choose"
                + (": choose token_grid" if isinstance(method, SemanticTokenGenerator) else "")
            )

        def set_rate(model: SemanticTokenViT, rate: object) -> None:
            (model.reducer if model.reduction is None else model.reduction).set_rate(rate)

        rates = method.rates(self.grid[0] * self.grid[1])
        match_macs(self, macs, self.img_size, rates=rates, set_rate=set_rate, in_chans=self.in_chans)

    def _forward_reduced(self, images: Tensor) -> tuple[Tensor, State, tuple[int, int]]:
        """Tokens before the final norm, what the method knows about them, and the grid that they came from."""
        x, hw = self.forward_stem(images)
        return *self._reduced(x), hw

    def _reduced(self, x: Tensor) -> tuple[Tensor, State]:
        """All layers, with the method at work inside them."""
        state = self.reduction.begin(x)
        for index, layer in enumerate([*self.base, *self.reducer.layers, *self.tail]):
            x, state = self._call(self.reduction.layer, index, layer, x, state)
        return x, state

    def _call(self, module: Callable[..., Any], *inputs: object) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def _position(self, hw: tuple[int, int]) -> Tensor:
        if hw == self.grid:
            return self.pos_embed
        sizes = (list(hw), list(self.grid))
        return constant(lambda: resample_abs_pos_embed(self.pos_embed, *sizes, num_prefix_tokens=self.position_prefix))


def init_linear(module: nn.Module) -> None:
    """Linear layers inside `module`: weights from a truncated normal of deviation .02, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                zeros_(part.bias)


def stvit_deit_tiny(**options: object) -> SemanticTokenViT:
    """STViT-DeiT-T: 192 channels, 3 heads, 12 layers; `options` as in `SemanticTokenViT`."""
    return SemanticTokenViT(**(dict(embed_dim=192, num_heads=3) | options))


def stvit_deit_small(**options: object) -> SemanticTokenViT:
    """STViT-DeiT-S: 384 channels, 6 heads, 12 layers; `options` as in `SemanticTokenViT`."""
    return SemanticTokenViT(**(dict(embed_dim=384, num_heads=6) | options))


def stvit_deit_base(**options: object) -> SemanticTokenViT:
    """STViT-DeiT-B: 768 channels, 12 heads, 12 layers; `options` as in `SemanticTokenViT`."""
    return SemanticTokenViT(**(dict(embed_dim=768, num_heads=12) | options))
