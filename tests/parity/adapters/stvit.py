"""Pieces of STViT as the golden cases name them, built from their configurations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from einops import rearrange
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from core.data.transforms import EvalTransform
from core.param_groups import split_decay
from core.schedules import warmup_cosine
from stvit.checkpoint import convert, resize_relative_bias
from stvit.losses import label_smoothing_cross_entropy, soft_target_cross_entropy
from stvit.models import (
    Attention,
    Block,
    ConvStem,
    PatchMerging,
    SemanticTokenViT,
    WindowTokenGenerator,
    WindowTokenRecovery,
    build_pool,
)

from ..cases import Case, UnknownPiece

Outputs = dict[str, Tensor]


def run(case: Case) -> Outputs:
    """Build the case's piece, load its weights through `stvit.checkpoint` and feed its inputs.

    Raises:
        UnknownPiece: the piece belongs to a part of the paper that is not built.
    """
    if case.piece not in _PIECES:
        raise UnknownPiece(f"the adapter of stvit knows no piece {case.piece!r}")
    with torch.set_grad_enabled(case.training):
        return _PIECES[case.piece](case)


def _load(module: nn.Module, case: Case) -> nn.Module:
    module.load_state_dict(convert(case.state_dict(), module))
    return module.train(case.training)


def _attention_options(case: Case) -> dict[str, object]:
    """`qkv_bias` and the relative position window of a layer; the table's length tells the window's side."""
    shapes = dict(case.params)
    table = next((shape for name, shape in shapes.items() if name.endswith("relative_position_bias_table")), None)
    return dict(
        qkv_bias=case.config.get("qkv_bias", True),
        relative_window=None if table is None else (math.isqrt(table[0]) + 1) // 2,
    )


def _layer_options(case: Case) -> dict[str, object]:
    """Arguments of a Swin-type `Block` (layer norm epsilon 1e-5); scales are there when the reference has them."""
    scaled = any(name.endswith("layer_scale_1") for name, _ in case.params)
    return dict(
        mlp_ratio=case.config.get("mlp_ratio", 4.0), layer_scale=1e-5 if scaled else None, norm_eps=1e-5
    ) | _attention_options(case)


def _attention(case: Case) -> Outputs:
    attention = Attention(case.config["dim"], case.config["num_heads"], **_attention_options(case))
    inputs = case.inputs()
    return {"y": _load(attention, case)(inputs["x"], inputs.get("y"))}


def _block(case: Case) -> Outputs:
    window = case.config["window_size"] if case.config.get("local") else None
    block = Block(case.config["dim"], case.config["num_heads"], window=window, **_layer_options(case))
    inputs = case.inputs()
    side = math.isqrt(inputs["x"].shape[1])
    return {"y": _load(block, case)(inputs["x"], inputs.get("y"), grid=(side, side) if window else None)}


def _pool_max(case: Case) -> Outputs:
    cells = case.config["sample_window_size"]
    windows = rearrange(case.inputs()["x"], "b c h w -> b h w c")
    return {"y": build_pool("max", windows.shape[-1], (cells, cells))(windows).flatten(1, 2)}


def _ref_pool(case: Case) -> Outputs:
    grid = case.config["grid"]
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    pool = build_pool("weighted_offset" if case.config.get("offset") else "weighted", case.config["dim"], grid)
    return {"y": _load(pool, case)(rearrange(case.inputs()["x"], "b c h w -> b h w c")).flatten(1, 2)}


def _ref_deit(case: Case) -> Outputs:
    config = case.config
    grid = config["grid"]
    model = SemanticTokenViT(
        img_size=config["img"] if isinstance(config["img"], int) else tuple(config["img"]),
        patch_size=config["patch"],
        num_classes=config["classes"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        base_depth=config["base"],
        stgm_depth=config["stgm"],
        token_grid=grid if isinstance(grid, int) else tuple(grid),
        pool=config["pool"],
        use_global=config["use_global"],
        global_in=config.get("global_in", "query"),
        shortcut=config.get("shortcut", True),
    )
    _load(model, case)
    image = case.inputs()["image"]
    base, hw = model.forward_base(image)
    tokens = model.forward_features(image)
    return {
        "base": base,
        "centres": model.reducer.centres(base, hw),
        "tokens": tokens,
        "logits": model.forward_head(tokens),
    }


def _exact_only(case: Case) -> None:
    if case.config.get("mask_mode") != "exact":
        raise UnknownPiece(f"mask_mode {case.config.get('mask_mode')!r} is not built: the dense layers are 'exact'")
    if case.config.get("key_concat") or case.config.get("use_conv_pos"):
        raise UnknownPiece("dense layers with key_concat or use_conv_pos are not built")


def _dense_generation(case: Case) -> Outputs:
    _exact_only(case)
    config, inputs = case.config, case.inputs()
    generator = WindowTokenGenerator(
        config["dim"],
        config["num_heads"],
        window=config["window_size"],
        per_window=config["sample"],
        key_windows=(config["key_window"],),
        shortcut=config["shortcut"] or "t" in inputs,
        **_layer_options(case),
    )
    _load(generator.layers[0], case)
    return {"y": generator(inputs["x"], (config["H"], config["W"]), inputs.get("t"))}


def _dense_recovery(case: Case) -> Outputs:
    _exact_only(case)
    config, inputs = case.config, case.inputs()
    recovery = WindowTokenRecovery(
        config["dim"],
        config["num_heads"],
        window=config["window_size"],
        per_window=config["sample"],
        key_window=config["key_window"],
        **_layer_options(case),
    )
    _load(recovery.layer, case)
    return {"y": recovery(inputs["x"], (config["H"], config["W"]), inputs["t"])}


def _stem_conv(case: Case) -> Outputs:
    stem = ConvStem(4, 3, case.config["embed_dim"])
    _load(stem, case)
    outputs = {"y": rearrange(stem(case.inputs()["x"]), "b c h w -> b (h w) c")}
    norm = stem.stages[-1].norm
    return outputs | {"running_mean": norm.running_mean, "running_var": norm.running_var}


def _patch_merging(case: Case) -> Outputs:
    side = case.config["input_resolution"]
    grid = (side, side) if isinstance(side, int) else tuple(side)
    return {"y": _load(PatchMerging(case.config["dim"]), case)(case.inputs()["x"], grid)}


def _relpos_resize(case: Case) -> Outputs:
    return {"y": resize_relative_bias(case.inputs()["table"], case.config["window_to"])}


def _losses(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    # The function behind `core.data.mix.Mix`, whose mixing coefficient is random.
    target = mixup_target(inputs["labels"], config["num_classes"], config["lam"], config["smoothing"])
    return {
        "target": target,
        "soft": soft_target_cross_entropy(inputs["logits"], target),
        "smooth": label_smoothing_cross_entropy(inputs["logits"], inputs["labels"], config["smoothing"]),
    }


def _lr_schedule(case: Case) -> Outputs:
    config = case.config
    # The release scales its rates by the global batch in units of 512.
    scale = config["batch"] / 512
    rates = dict(
        total=config["epochs"] * config["iters_per_epoch"],
        lr=config["base_lr"] * scale,
        warmup=config["warmup_epochs"] * config["iters_per_epoch"],
        warmup_lr=config["warmup_lr"] * scale,
        min_lr=config["min_lr"] * scale,
        prefix=False,
    )
    after = torch.tensor([warmup_cosine(step, **rates) for step in range(rates["total"])], dtype=torch.float64)
    # The first step runs at the schedule's start, every later one at what the update after the step before it set.
    used = torch.cat([after[:1], after[:-1]])
    return {"lr_after_update": after * 1e3, "lr_used": used * 1e3}


def _decay_groups(case: Case) -> Outputs:
    parameters = [(name, nn.Parameter(torch.empty((1,) * _axes(name), device="meta"))) for name in case.meta["names"]]
    decayed, _ = split_decay(parameters, ndim_max=1, bias=True, names=("absolute_pos_embed", _TABLES))
    return {"decay": torch.tensor([float(name in set(decayed)) for name in case.meta["names"]])}


_TABLES = "relative_position_bias_table"


def _axes(name: str) -> int:
    """Axes of a published STViT-R-Swin parameter: what the decay rule looks at besides names."""
    if name.endswith((".bias", _TABLES)) or re.search(r"layer_scale_\d$", name):
        return 2 if name.endswith(_TABLES) else 1
    if re.search(r"(semantic_token2|absolute_pos_embed)$", name):
        return 3
    if re.search(r"(^|\.)(norm\d*|bn)\.weight$", name):
        return 1
    return 4 if re.search(r"\.c\.weight$|conv_pos\.proj\.\d\.weight$", name) else 2


def _eval_transform(case: Case) -> Outputs:
    size = case.config["img_size"]
    image = case.inputs()["image"].to(torch.uint8).numpy()
    return {"x": EvalTransform(size=size, resize=int(256 / 224 * size), interpolation="bicubic")(image)}


_PIECES: dict[str, Callable[[Case], Outputs]] = {
    "attention": _attention,
    "block": _block,
    "decay_groups": _decay_groups,
    "eval_transform": _eval_transform,
    "losses": _losses,
    "lr_schedule": _lr_schedule,
    "patch_merging": _patch_merging,
    "pool_max": _pool_max,
    "ref_deit": _ref_deit,
    "ref_dense_exact_recover": _dense_recovery,
    "ref_dense_exact_stgm": _dense_generation,
    "ref_dense_exact_stgm2": _dense_generation,
    "ref_pool": _ref_pool,
    "relpos_resize": _relpos_resize,
    "stem_conv": _stem_conv,
}
