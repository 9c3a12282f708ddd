"""One door to all token reducers: a trained ViT goes on with another method, its weights kept."""

from __future__ import annotations

import copy
from functools import partial

import torch
from timm.layers import LayerScale, Mlp
from timm.models import VisionTransformer, VisionTransformerDistilled
from timm.utils import unwrap_model
from torch import nn

from stvit.checkpoint import from_deit
from stvit.models.block import set_shortcut
from stvit.models.classifier import GLOBAL_POOLS
from stvit.models.reducers import build_reducer
from stvit.models.vit import SemanticTokenViT, init_linear


def sparsify(
    model: nn.Module,
    method: str = "semantic",
    *,
    base_depth: int | None = None,
    stgm_depth: int | None = None,
    token_grid: int | tuple[int, int] | None = None,
    pool: str = "weighted_offset",
    use_global: bool = True,
    global_in: str = "query",
    shortcut: bool = True,
    macs: float | None = None,
    **options: object,
) -> SemanticTokenViT:
    """A copy of a plain ViT that reduces its tokens by `method`; all weights that have a place in it are kept.

    Methods without parameters of their own (`all`, `random`, `tome`, `evit`, `topk`, `ats`) can be used as they are;
    `semantic`, `pooled` and `dynamicvit` start with fresh pooling, global centres or predictors: train them.

    Args:
        model: a `SemanticTokenViT`, or timm's `VisionTransformer` (ViT, DeiT, distilled too; registers; CLIP's and
            SigLIP's image encoders), bare or in a wrapper (`torch.compile`, DDP, weight averages).
        method: a name in `stvit.models.reducers.REDUCERS`.
        base_depth: layers before the reduction of `semantic`, `pooled` and `random`; None: as in `model` (4 of a timm
            model's).
        stgm_depth: how many of the layers after them generate semantic tokens; None: as in `model` (2).
        token_grid: grid of the tokens that these methods leave; None: as in `model` (4 x 4).
        pool: initial centres, see `SemanticTokenViT`; likewise `use_global`, `global_in`, `shortcut`.
        use_global: learned global centres.
        global_in: where they enter.
        shortcut: residual of the first generation layer.
        macs: multiply-accumulates that an image shall cost, see `SemanticTokenViT.match_macs`.
        options: arguments of the method, e.g. `r=13` for `tome`.

    Returns:
        A new model on the same device, in the same mode. With `semantic` class and distillation tokens go: the mean of
        the semantic tokens is classified (or pooled by attention, where the model does so), by the mean of two
        classifiers where there are two. Registers stay in the base layers, as they were, and go with the image tokens.

    Raises:
        TypeError: `model` is no plain ViT.
        ValueError: unknown method or option, or a ViT with parts that have no counterpart.
    """
    model = unwrap_model(model)
    if isinstance(model, VisionTransformer):
        result = plain_vit(model, class_token=method != "semantic")
    elif isinstance(model, SemanticTokenViT):
        result = copy.deepcopy(model)
    else:
        raise TypeError(
            f"sparsify() takes a SemanticTokenViT or timm's VisionTransformer, not a {type(model).__name__}: models "
            "with windows need tokens on a regular grid, see the tokens= argument of STViTSwin"
        )
    if method == "semantic" and result.cls_token is not None:
        _drop_class_token(result)
    layers = [*result.base, *result.reducer.layers, *result.tail]
    base_depth = len(result.base) if base_depth is None else base_depth
    stgm_depth = len(result.reducer.layers) if stgm_depth is None else stgm_depth
    if base_depth < 0 or stgm_depth < 1 or base_depth + stgm_depth > len(layers):
        raise ValueError(f"base_depth={base_depth} and stgm_depth={stgm_depth} do not fit into {len(layers)} layers")
    if token_grid is not None:
        result.token_grid = (token_grid, token_grid) if isinstance(token_grid, int) else tuple(token_grid)
    registers = 0 if result.reg_token is None else result.reg_token.shape[1]
    reducer, result.reduction = build_reducer(
        method,
        result.embed_dim,
        layers[0].attn.num_heads,
        layers=dict(depth=stgm_depth),
        centres=dict(grid=result.token_grid, pool=pool),
        generation=dict(use_global=use_global, global_in=global_in, shortcut=shortcut),
        method=dict(depth=len(layers), class_token=result.cls_token is not None, registers=registers),
        options=options,
    )
    result.set_global_pool(result.global_pool)
    for part in (reducer, result.reduction):
        if part is not None:
            init_linear(part)
            part.to(result.pos_embed).train(model.training)
    generated = base_depth + stgm_depth
    reducer.layers = nn.ModuleList(layers[base_depth:generated])
    for layer in layers:
        layer.shortcut = True
    set_shortcut(reducer.layers[0], shortcut or method != "semantic")
    result.base, result.reducer, result.tail = (
        nn.ModuleList(layers[:base_depth]),
        reducer,
        nn.ModuleList(layers[generated:]),
    )
    if macs is not None:
        result.match_macs(macs)
    return result


def _drop_class_token(model: SemanticTokenViT) -> None:
    """Class and distillation token, their positions and the second classifier go."""
    gone = 1 + (model.head_dist is not None)
    if not model.no_embed_class:
        model.pos_embed = nn.Parameter(model.pos_embed[:, gone:].detach().clone())
    model.cls_token = None
    if model.head_dist is not None:
        with torch.no_grad():
            for own, other in zip(model.head.parameters(), model.head_dist.parameters(), strict=True):
                own.copy_((own + other) / 2)
        model.head_dist = None
        rest = model.reg_token[:, 1:].detach().clone()
        model.reg_token = nn.Parameter(rest) if rest.shape[1] else None
    if model.global_pool == "token":
        model.set_global_pool("avg")


def plain_vit(model: VisionTransformer, *, class_token: bool = True) -> SemanticTokenViT:
    """timm's ViT as a `SemanticTokenViT` with all tokens: the same function, or with `class_token=False` its start.

    Args:
        model: ViT, DeiT, CLIP's or SigLIP's image encoder, or another of the same parts.
        class_token: False leaves out the class token and its position; the mean is classified instead.

    Raises:
        ValueError: parts that have no counterpart, listed.
    """
    found = [what for what, there in _foreign(model).items() if there]
    if found:
        raise ValueError(f"this ViT cannot be taken over: it has {', '.join(found)}")
    block, distilled = model.blocks[0], isinstance(model, VisionTransformerDistilled)
    depth, front = len(model.blocks), 0 if model.no_embed_class else model.num_prefix_tokens
    plain = SemanticTokenViT(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        embed_dim=model.embed_dim,
        depth=depth,
        num_heads=block.attn.num_heads,
        base_depth=min(4, depth - 1),
        stgm_depth=min(2, depth - min(4, depth - 1)),
        tokens="all",
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=1e-5 if isinstance(block.ls1, LayerScale) else None,
        class_token=model.cls_token is not None,
        reg_tokens=model.num_reg_tokens + distilled,
        distilled=distilled,
        no_embed_class=model.pos_embed.shape[1] != model.patch_embed.num_patches + front or model.no_embed_class,
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        final_norm=any(isinstance(norm, nn.LayerNorm) for norm in (model.norm, model.fc_norm)),
        fc_norm=isinstance(model.fc_norm, nn.LayerNorm),
        global_pool=model.global_pool,
        act_layer=partial(copy.deepcopy, block.mlp.act),
        drop_rate=model.head_drop.p,
        proj_drop_rate=block.attn.proj_drop.p,
        pos_drop_rate=model.pos_drop.p,
        attn_drop_rate=block.attn.attn_drop.p,
        drop_path_rate=getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0),
        norm_eps=block.norm1.eps,
    )
    if plain.attn_pool is not None:
        plain.attn_pool = copy.deepcopy(model.attn_pool)
    plain.load_state_dict(from_deit(model.state_dict(), plain))
    if not class_token and plain.cls_token is not None:
        _drop_class_token(plain)
    return plain.to(model.pos_embed).train(model.training)


def _foreign(model: VisionTransformer) -> dict[str, bool]:
    """What a ViT may have that a `SemanticTokenViT` has no counterpart of -> whether it has."""
    block, kind = model.blocks[0], type(model)
    known = VisionTransformerDistilled if isinstance(model, VisionTransformerDistilled) else VisionTransformer
    inherited = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
    projection, mlp = getattr(model.patch_embed, "proj", None), getattr(block, "mlp", None)
    plain = hasattr(block, "ls1") and hasattr(getattr(block, "attn", None), "qkv")
    norms = [getattr(block, name, None) for name in ("norm1", "norm2")]
    norms += [n for n in (model.norm, model.fc_norm, model.norm_pre) if not isinstance(n, nn.Identity)]
    extra = [getattr(block.attn, name, None) for name in ("q_norm", "k_norm", "norm")] if plain else []
    return {
        "a forward pass of its own": any(getattr(kind, name) is not getattr(known, name) for name in inherited),
        "another layer than attention and MLP in turn": not plain,
        "norms of queries, keys or attention's output": any(not isinstance(n, nn.Identity | None) for n in extra),
        "attention without a bias behind it": plain and block.attn.proj.bias is None,
        "another MLP than two linear layers": type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity),
        "another norm than LayerNorm": not all(isinstance(norm, nn.LayerNorm) for norm in norms),
        "no learned position embedding": model.pos_embed is None,
        "another patch embedding than one projection of square patches": not isinstance(projection, nn.Conv2d)
        or len(set(projection.kernel_size)) > 1
        or projection.kernel_size != projection.stride
        or not isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity)
        or (projection.bias is None) != isinstance(model.norm_pre, nn.LayerNorm),
        "patch dropout (patch_drop_rate), which leaves the grid": not isinstance(model.patch_drop, nn.Identity),
        "pooling that includes tokens in front (pool_include_prefix)": model.pool_include_prefix,
        f"global_pool={model.global_pool!r}": model.global_pool not in GLOBAL_POOLS,
    }
