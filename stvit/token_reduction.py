"""One door to all token reducers: a trained ViT goes on with another method, its weights kept."""

from __future__ import annotations

import copy

from timm.layers import LayerScale
from timm.models import VisionTransformer
from torch import nn

from stvit.checkpoint import from_deit
from stvit.models.block import set_shortcut
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

    Methods without parameters of their own (`all`, `random`, `tome`, `evit`, `topk`) can be used as they are;
    `semantic`, `pooled` and `dynamicvit` start with fresh pooling, global centres or predictors: train them.

    Args:
        model: a `SemanticTokenViT`, or timm's `VisionTransformer` (DeiT, ViT; no register or distillation tokens).
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
        A new model on the same device, in the same mode. With `semantic` the class token goes: the mean is classified.

    Raises:
        TypeError: `model` is no plain ViT.
        ValueError: unknown method or option, or a ViT with parts that have no counterpart.
    """
    if isinstance(model, VisionTransformer):
        result = plain_vit(model, class_token=model.cls_token is not None and method != "semantic")
    elif isinstance(model, SemanticTokenViT):
        result = copy.deepcopy(model)
    else:
        raise TypeError(
            f"sparsify() takes a SemanticTokenViT or timm's VisionTransformer, not a {type(model).__name__}: models "
            "with windows need tokens on a regular grid, see the tokens= argument of STViTSwin"
        )
    if method == "semantic" and result.cls_token is not None:
        result.cls_token = None
        result.pos_embed = nn.Parameter(result.pos_embed[:, 1:].detach().clone())
    layers = [*result.base, *result.reducer.layers, *result.tail]
    base_depth = len(result.base) if base_depth is None else base_depth
    stgm_depth = len(result.reducer.layers) if stgm_depth is None else stgm_depth
    if base_depth < 0 or stgm_depth < 1 or base_depth + stgm_depth > len(layers):
        raise ValueError(f"base_depth={base_depth} and stgm_depth={stgm_depth} do not fit into {len(layers)} layers")
    if token_grid is not None:
        result.token_grid = (token_grid, token_grid) if isinstance(token_grid, int) else tuple(token_grid)
    reducer, result.reduction = build_reducer(
        method,
        result.embed_dim,
        layers[0].attn.num_heads,
        layers=dict(depth=stgm_depth),
        centres=dict(grid=result.token_grid, pool=pool),
        generation=dict(use_global=use_global, global_in=global_in, shortcut=shortcut),
        method=dict(depth=len(layers), class_token=result.cls_token is not None),
        options=options,
    )
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


def plain_vit(model: VisionTransformer, *, class_token: bool = True) -> SemanticTokenViT:
    """timm's ViT as a `SemanticTokenViT` with all tokens: the same function, or with `class_token=False` its start.

    Args:
        model: DeiT, or a ViT of the same parts.
        class_token: False leaves out the class token and its position; the mean is classified instead.

    Raises:
        ValueError: parts that have no counterpart, listed.
    """
    block = model.blocks[0]
    grid = model.patch_embed.grid_size
    foreign = {
        "register or distillation tokens": model.num_prefix_tokens != 1 or model.cls_token is None,
        "a position embedding that leaves out the class token": model.pos_embed is None
        or model.pos_embed.shape[1] != grid[0] * grid[1] + 1,
        "a norm before the layers (norm_pre)": not isinstance(model.norm_pre, nn.Identity),
        "a norm after pooling (fc_norm)": not isinstance(model.fc_norm, nn.Identity),
        "a pooling other than the class token": model.global_pool not in ("token", ""),
        "another layer than attention and MLP in turn": not hasattr(block, "ls1") or not hasattr(block.attn, "qkv"),
        "an activation other than the exact GELU": not (
            isinstance(getattr(block.mlp, "act", None), nn.GELU) and block.mlp.act.approximate == "none"
        ),
    }
    found = [name for name, there in foreign.items() if there]
    if found:
        raise ValueError(f"this ViT cannot be taken over: it has {', '.join(found)}")
    rate = getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0)
    plain = SemanticTokenViT(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        base_depth=min(4, len(model.blocks) - 1),
        stgm_depth=min(2, len(model.blocks) - min(4, len(model.blocks) - 1)),
        tokens="all",
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=1e-5 if isinstance(block.ls1, LayerScale) else None,
        class_token=class_token,
        drop_path_rate=rate,
        norm_eps=model.norm.eps,
    )
    plain.load_state_dict(from_deit(model.state_dict(), plain))
    return plain.to(model.pos_embed).train(model.training)
