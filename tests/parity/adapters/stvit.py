"""Pieces of STViT as the golden cases name them, built from their configurations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from timm.data.mixup import mixup_target
from torch import nn

from core.data.transforms import EvalTransform
from core.optim.groups import split_decay
from core.optim.schedules import warmup_cosine
from stvit.checkpoint import convert, resize_relative_bias, revert
from stvit.checkpoint.state import inside
from stvit.losses import label_smoothing_cross_entropy, soft_target_cross_entropy
from stvit.models import (
    Attention,
    Block,
    ConvStem,
    PatchMerging,
    SemanticTokenViT,
    STViTRSwin,
    SwinBlock,
    WindowTokenGenerator,
    WindowTokenRecovery,
    build_pool,
)
from stvit.models.dumbbell import SemanticStage
from stvit.models.key_windows import KeyWindows

from ..cases import Case, UnknownPiece
from . import Outputs, run_from

run = run_from("stvit", eval_gradients=False)


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


def _grid(side: int | list[int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)


def _mask_mode(config: dict[str, object]) -> str:
    return "none" if config.get("pad_mask") is False else config.get("mask_mode", "official")


def _generator(case: Case, key_windows: tuple[int | None, ...], **options: object) -> WindowTokenGenerator:
    """A generator whose layers are one layer of the reference, position encoding included."""
    config = case.config
    generator = WindowTokenGenerator(
        config["dim"],
        config["num_heads"],
        window=config["window_size"],
        per_window=config.get("sample", config.get("sample_window_size")),
        key_windows=key_windows,
        key_mode="concat" if config.get("key_concat") else "window",
        use_conv_pos=config.get("use_conv_pos", False),
        **_layer_options(case),
        **options,
    )
    state = case.state_dict()
    if generator.conv_pos is not None:
        for part in ("weight", "bias"):
            getattr(generator.conv_pos, part).data = state.pop(f"conv_pos.proj.0.{part}")
    generator.layers[0].load_state_dict(convert(state, generator.layers[0]))
    return generator.train(case.training)


def _dense_generation(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    generator = _generator(
        case,
        (config["key_window"],),
        shortcut=config.get("shortcut", True) or "t" in inputs,
        mask_mode=_mask_mode(config),
    )
    return {"y": generator(inputs["x"], (config["H"], config["W"]), inputs.get("t"))}


def _stgm_window(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    generator = _generator(case, (config["key_window"],), shortcut=config.get("shortcut", False))
    _unfold(generator, config["key_window"], config["key_stride"])
    side = math.isqrt(inputs["x"].shape[1])
    return {"y": generator(inputs["x"], (side, side), inputs.get("t"))}


def _unfold(generator: WindowTokenGenerator, size: int = 10, stride: int = 4) -> None:
    """Lay key windows as the release does: from the first row and column on, whatever the map."""
    generator.layers[0].windows = KeyWindows(generator.per_window, size, stride, lead=0)


def _dense_recovery(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    recovery = WindowTokenRecovery(
        config["dim"],
        config["num_heads"],
        window=config["window_size"],
        per_window=config["sample"],
        key_window=config["key_window"],
        mask_mode=_mask_mode(config),
        **_layer_options(case),
    )
    _load(recovery.layer, case)
    return {"y": recovery(inputs["x"], (config["H"], config["W"]), inputs["t"])}


def _swin_block(case: Case) -> Outputs:
    config = case.config
    hw = _grid(config["input_resolution"])
    # The release adapts the window to small maps when it builds the layer; the table has the size of the result.
    window = min(config["window_size"], *hw)
    block = SwinBlock(
        config["dim"],
        config["num_heads"],
        window=window,
        shift=config["shift_size"] if min(hw) > config["window_size"] else 0,
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=1e-5 if config.get("use_layer_scale") else None,
    )
    return {"y": _load(block, case)(case.inputs()["x"], hw)}


def _swin_options(case: Case, **renamed: str) -> dict[str, object]:
    """Arguments of `STViTRSwin` under their names in the reference, and what its weights tell."""
    config = case.config
    ours = ("embed_dim", "depths", "num_heads", "window_size", "num_classes", "in_chans", "mlp_ratio", "qkv_bias")
    ours += ("patch_size", "shortcut")
    options = {name: config[name] for name in ours if name in config}
    options |= {name: config[theirs] for name, theirs in renamed.items() if theirs in config}
    return options | _parts(name for name, _ in case.params or [(name, ()) for name in case.meta.get("names", ())])


def _parts(names: Iterable[str]) -> dict[str, object]:
    """Optional parts of the reference, seen from the parameters it has."""
    names = list(names)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    stage = r"(^|layers\.2\.)blocks\.\d+\."
    return dict(
        use_global=has(r"semantic_token2$"),
        use_conv_pos=has(r"conv_pos\.proj\.0\.weight$"),
        # Swin layers have a packed projection and always a table; those of semantic layers stand beside a separate q.
        relative_pos=any(
            name.replace("attn.relative_position_bias_table", "attn.q.weight") in names
            for name in names
            if name.endswith("relative_position_bias_table")
        ),
        layer_scale=1e-5 if has(stage + r"layer_scale_1$") else None,
        layer_scale_swin=1e-5 if has(r"layers\.[013]\.blocks\.\d+\.layer_scale_1$") else None,
    )


def _model(case: Case) -> Outputs:
    model = STViTRSwin(**_swin_options(case, per_window="sample_window_size", img_size="img_size"))
    _load(model, case)
    image = case.inputs()["image"]
    tokens, maps = model.forward_intermediates(image)
    outputs = {}
    for i, features in enumerate(maps):
        hw = (features.shape[2], features.shape[3])
        x = rearrange(features, "b c h w -> b (h w) c")
        # The reference's stages end with the merging that begins ours.
        outputs[f"stage{i}"] = model.stages[i + 1].downsample(x, hw) if i < 3 else x
    pooled = model.forward_head(tokens, pre_logits=True)
    return outputs | {"pooled": pooled, "logits": model(image)}


def _backbone(case: Case) -> Outputs:
    config = case.config
    windows = [config.get(name, default) for name, default in (("k1", 14), ("k2", 21), ("restore_k", 27))]
    model = STViTRSwin(
        features_only=True,
        mask_mode=_mask_mode(config),
        key_windows=windows,
        out_indices=config.get("out_indices", (0, 1, 2, 3)),
        **_swin_options(case, per_window="sample"),
    )
    maps = _load(model, case)(case.inputs()["image"])
    return {f"out{i}": features for i, features in zip(model.out_indices, maps, strict=True)}


def _stage3(case: Case) -> tuple[SemanticStage, PatchMerging | None, tuple[int, int]]:
    """Stage 3 of the classifier, the merging behind it, and its raster."""
    config = case.config
    options = {name: config[name] for name in ("window_size", "shortcut", "mlp_ratio", "qkv_bias") if name in config}
    options |= _parts(name for name, _ in case.params)
    hw = _grid(config.get("input_resolution", math.isqrt(case.given["x"]["shape"][1])))
    model = STViTRSwin(
        img_size=(16 * hw[0], 16 * hw[1]),
        embed_dim=config["dim"] // 4,
        depths=(1, 1, config["depth"], 1),
        num_heads=(1, 1, config["num_heads"], 1),
        per_window=config.get("sample_window_size", 3),
        **options,
    )
    stage = model.stages[2]
    state = case.state_dict()
    merging = PatchMerging(config["dim"]) if config.get("downsample") else None
    if merging is not None:
        merging.load_state_dict(convert(inside(state, "downsample."), merging))
    stage.downsample = None
    for unit in stage.units if hw != (14, 14) else ():
        _unfold(unit.generator)
    stage.load_state_dict(convert({n: v for n, v in state.items() if not n.startswith("downsample.")}, stage))
    return stage.train(case.training), merging, hw


def _stage3_run(case: Case) -> Outputs:
    stage, merging, hw = _stage3(case)
    outputs = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, given, output: outputs.__setitem__(name, output)

    unit = stage.units[0]
    for i, layer in enumerate([*unit.base, *unit.generator.layers, *unit.semantic, unit.recovery]):
        layer.register_forward_hook(record(f"layer{i}"))
    y, hw = stage(case.inputs()["x"], hw)
    return outputs | {"y": y if merging is None else merging(y, hw)}


def _stage3_grad(case: Case) -> Outputs:
    stage, merging, hw = _stage3(case)
    inputs = case.inputs()
    y, hw = stage(inputs["x"], hw)
    y = y if merging is None else merging(y, hw)
    loss = (y - inputs["target"]).square().mean()
    loss.backward()
    names = {f"stages.2.{name}": parameter.grad for name, parameter in stage.named_parameters()}
    grads = {f"grad.{name.removeprefix('layers.2.')}": value for name, value in revert(names).items()}
    return {"loss": loss} | grads


def _stem_conv(case: Case) -> Outputs:
    stem = ConvStem(4, 3, case.config["embed_dim"])
    _load(stem, case)
    outputs = {"y": rearrange(stem(case.inputs()["x"]), "b c h w -> b (h w) c")}
    norm = stem.stages[-1].norm
    return outputs | {"running_mean": norm.running_mean, "running_var": norm.running_var}


def _patch_merging(case: Case) -> Outputs:
    merging = _load(PatchMerging(case.config["dim"]), case)
    return {"y": merging(case.inputs()["x"], _grid(case.config["input_resolution"]))}


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
    with torch.device("meta"):
        model = STViTRSwin(**_swin_options(case))
    # The rule looks at names, so the parameters are held against it under the names of the release.
    parameters = [(name, nn.Parameter(value)) for name, value in revert(dict(model.named_parameters())).items()]
    decayed, kept = split_decay(parameters, ndim_max=1, bias=True, names=("absolute_pos_embed", _TABLES))
    names = sorted([*decayed, *kept])
    if names != case.meta["names"]:
        raise AssertionError(f"parameters differ: {sorted(set(names) ^ set(case.meta['names']))}")
    return {"decay": torch.tensor([float(name in set(decayed)) for name in names])}


_TABLES = "relative_position_bias_table"


def _eval_transform(case: Case) -> Outputs:
    size = case.config["img_size"]
    image = case.inputs()["image"].to(torch.uint8).numpy()
    return {"x": EvalTransform(size=size, resize=int(256 / 224 * size), interpolation="bicubic")(image)}


def inventory(name: str, content: dict[str, object]) -> None:
    """Convert the keys of a published STViT-R-Swin: none may be missing or left over.

    Raises:
        AssertionError: they do not give the parameters of our model of that size.
        UnknownPiece: an inventory of something else.
    """
    match = re.fullmatch(r"keys_stvit_r_swin_([tsb])(_backbone)?", name)
    if match is None:
        raise UnknownPiece(f"no inventory of stvit is called {name!r}")
    arch = {"t": "tiny", "s": "small", "b": "base"}[match[1]]
    # Integers stand for the tensors: every source has its own, so that what arrives where is seen.
    published = {key: torch.full(shape, i).float() for i, (key, shape) in enumerate(content["keys"])}
    with torch.device("meta"):
        model = STViTRSwin(arch=arch, features_only=bool(match[2]))
    ours = convert(published, model)
    back = revert(ours)
    computed = {key for key in published if key.endswith((".relative_position_index", ".attn_mask"))}
    assert back.keys() == published.keys() - computed, sorted(back.keys() ^ (published.keys() - computed))
    assert all(torch.equal(back[key], published[key]) for key in back)
    assert ours.keys() == convert(published, "dense" if match[2] else "classification").keys()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == content["total_parameters"], f"{total} parameters, published {content['total_parameters']}"
    buffers = {name for name, _ in model.named_buffers()}
    assert sum(value.numel() for name, value in ours.items() if name not in buffers) == total


PIECES: dict[str, Callable[[Case], Outputs]] = {
    "attention": _attention,
    "backbone": _backbone,
    "block": _block,
    "decay_groups": _decay_groups,
    "dense_recover": _dense_recovery,
    "dense_stgm": _dense_generation,
    "dense_stgm2": _dense_generation,
    "eval_transform": _eval_transform,
    "losses": _losses,
    "lr_schedule": _lr_schedule,
    "model": _model,
    "patch_merging": _patch_merging,
    "pool_max": _pool_max,
    "ref_deit": _ref_deit,
    "ref_dense_exact_recover": _dense_recovery,
    "ref_dense_exact_stgm": _dense_generation,
    "ref_dense_exact_stgm2": _dense_generation,
    "ref_pool": _ref_pool,
    "relpos_resize": _relpos_resize,
    "stage3": _stage3_run,
    "stage3_grad": _stage3_grad,
    "stem_conv": _stem_conv,
    "stgm_window": _stgm_window,
    "swin_block": _swin_block,
}
