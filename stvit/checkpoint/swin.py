"""Swin and STViT-R-Swin: the layouts of the released models, of timm and of Swin's authors, and ours.

- `official`: `patch_embed.proj.{0,2}.{c,bn}`, `layers.I.blocks.J` (layers of a dumbbell unit are numbered through),
  `layers.I.downsample` (the merging behind stage I), `layers.2.semantic_token2`, `norm` and `head`, or `norm0..3`;
- plain Swin: the same with `patch_embed.{proj,norm}` and packed `attn.qkv` throughout; timm stores the merging behind
  stage I as `layers.{I+1}.downsample` and the classifier as `head.fc`.

Ours: `stem`, `stages.I.{downsample, blocks.J}`, in stages with semantic tokens `units.U.{base.J, generator.layers.J,
semantic.J, recovery.layer}`, `norm` and `head`, or `norms.I`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from core.checkpoint.fitting import CheckpointMismatch, fit, report
from stvit.checkpoint.state import State, count, inside, resize_tables, split_qkv, unwrap
from stvit.models.dumbbell import SemanticStage
from stvit.models.hierarchy import HierarchicalTransformer, resize_position
from stvit.models.stem import ConvStem
from stvit.models.stvit_r_swin import STViTRSwin
from stvit.models.swin import SwinTransformer

_STEM_PARTS = {"c": "conv", "bn": "norm"}
_DETECTOR = ("neck.", "rpn_head.", "roi_head.")
# What no checkpoint of plain Swin holds; it stays as the model has it.
_FRESH = re.compile(
    r"stem\.stages\.|norms\.|.*\.generator\.(pool|conv_pos|position|global_centres)|"
    r".*\.(generator|semantic|recovery)\..*relative_position_bias_table$"
)


def is_hierarchical(state: Iterable[str]) -> bool:
    """Whether the names are those of a model with stages, ours or another's."""
    return any(re.match(r"(backbone\.)?(layers|stages)\.\d+\.(blocks|units)\.", name) for name in state)


def is_plain(state: Iterable[str]) -> bool:
    """Whether the names are those of plain Swin in a layout that is not ours."""
    return any(re.match(r"layers\.2\.blocks\.1\.attn\.qkv\.", name) for name in state)


def is_released_dense(state: Iterable[str]) -> bool:
    """Whether it is an STViT-R-Swin backbone as the released detectors hold it, trained with the release's masks."""
    names = set(state)
    return "layers.2.blocks.1.attn.kv.weight" in names and any(re.match(r"norm\d\.", name) for name in names)


def _mask_as_released(model: nn.Module) -> None:
    """Gives a model without masks of its own choice those that the released detectors were trained with."""
    if not isinstance(model, STViTRSwin) or model.key_mode != "window" or model.mask_mode == "official":
        return
    if model.mask_mode_given:
        _log(
            f"the released detectors were trained with mask_mode=official, this model has mask_mode={model.mask_mode}: "
            "its maps differ from the release's where images are padded"
        )
        return
    model.set_mask_mode("official")
    _log(
        "weights of a released detector: masks as released (mask_mode=official). Name that mode in the config, so that "
        "models that are built anew for later checkpoints have it too"
    )


def _log(message: str) -> None:
    print_log(message, "current", logging.WARNING)


# ------------------------------------------------------------------ others' to ours


def convert_swin(state: State, target: nn.Module | str | None, *, load_head: bool = True) -> State:
    """Names of any layout to ours, for `target`: a module, `classification`, `dense`, `detector`, or None.

    See `stvit.checkpoint.convert`.
    """
    detector = any(name.startswith("backbone.") for name in state)
    if target == "detector":
        if not detector:
            raise CheckpointMismatch("this is no detector: no entry begins with 'backbone.'; use target='dense'")
        others = {name: value for name, value in state.items() if not name.startswith("backbone.")}
        backbone = convert_swin(inside(state, "backbone."), "dense")
        return {f"backbone.{name}": value for name, value in backbone.items()} | others
    if detector:
        strange = [n for n in state if not n.startswith(("backbone.", *_DETECTOR))]
        if strange:
            raise CheckpointMismatch(report("entries that are no part of a detector", unexpected=strange))
        state = inside(state, "backbone.")
    if isinstance(target, nn.Module):
        if is_plain(state) and isinstance(target, HierarchicalTransformer):
            return from_swin(state, target, load_head=load_head)
        ours = _for_module(state, target, load_head)
        if is_released_dense(state):
            _mask_as_released(target)
        return ours
    if is_plain(state):
        return from_swin(state, infer_swin(state))
    own = any(name.startswith(("norms.", "norm0.", "norm1.", "norm2.", "norm3.")) for name in state)
    dense = own if target is None else target == "dense"
    model = infer_r_swin(state, dense)
    ours = _adapted(state, model)
    if is_released_dense(state):
        _log("weights of a released detector: load them into a model with mask_mode=official, the masks they know")
    if dense and not own:  # the output norms are not in a classification checkpoint
        norms = {name: value for name, value in model.state_dict().items() if name.startswith("norms.")}
        return {name: value for name, value in fit(ours | norms, model).items() if name not in norms}
    return fit(ours, model)


def from_swin(state: Mapping[str, Tensor], model: HierarchicalTransformer, *, load_head: bool = True) -> State:
    """Weights for `model` from a plain Swin checkpoint, timm's or its authors'.

    Layers that work on semantic tokens take over a Swin layer: its packed projection is split, its relative positions
    are dropped, and their layer scales, which Swin has not, start at 1. Pooling, global centres, position encodings
    and, where Swin's stem has no counterpart, the stem stay as the model has them.

    Args:
        state: Swin's state dict, or the content of a file.
        model: a `SwinTransformer`, `STViTSwin` or `STViTRSwin` of the same depths; gives names, shapes and the rest.
        load_head: False keeps the model's own classifier (another number of classes).

    Returns:
        A dict that `model.load_state_dict` takes with `strict=True`.

    Raises:
        CheckpointMismatch: entries are missing, left over or of another shape.
    """
    own = model.state_dict()
    places = _places_of(model)
    state = unwrap(state)
    state = inside(state, "backbone.") if all(name.startswith("backbone.") for name in state) else state
    behind = "layers.0.downsample.norm.weight" in state
    ours: State = {}
    for name, value in state.items():
        name = re.sub(r"^patch_embed\.", "stem.", name)
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + behind}.downsample.", name)
        name = re.sub(r"^layers\.(\d+)\.blocks\.(\d+)\.", lambda m: _place(int(m[1]), int(m[2]), places), name)
        ours[re.sub(r"^head\.fc\.", "head.", name)] = value
    ours = split_qkv(ours, own)
    if isinstance(model.stem, ConvStem):
        ours = {name: value for name, value in ours.items() if not name.startswith("stem.")}
    # Tables of layers that now work on semantic tokens; layer scales of layers that come from Swin.
    ours = {n: v for n, v in ours.items() if n in own or not n.endswith("relative_position_bias_table")}
    ours = {n: v for n, v in ours.items() if not _FRESH.match(n)}
    ours |= {n: torch.ones_like(v) for n, v in own.items() if re.search(r"\.ls[12]\.gamma$", n)}
    ours |= {n: v for n, v in own.items() if _FRESH.match(n)}
    ours = _without_classifier(ours, model, own, load_head)
    return fit(resize_tables(_fit_position(ours, model), own), model, hint="" if not load_head else _HEAD_HINT)


_HEAD_HINT = "load_head=False keeps the model's own classifier"


def _for_module(state: State, target: nn.Module, load_head: bool) -> State:
    own = target.state_dict()
    ours = _adapted(state, target)
    if isinstance(target, HierarchicalTransformer):
        dense_start = target.features_only and not any(name.startswith("norms.") for name in ours)
        ours = _without_classifier(ours, target, own, load_head)
        if dense_start:
            ours |= {name: value for name, value in own.items() if name.startswith("norms.")}
    return fit(ours, target, hint=_HEAD_HINT if load_head and "head.weight" in ours else "")


def _adapted(state: State, target: nn.Module) -> State:
    """Official names to ours, projections split and tables resampled where the target wants it."""
    own = target.state_dict()
    ours = resize_tables(split_qkv(rename(_fit_position(state, target), _places_of(target)), own), own)
    if getattr(target, "features_only", False):
        ours = {n: v for n, v in ours.items() if not re.match(r"(norm|head)\.", n)}
        ours = {n: v for n, v in ours.items() if n in own or not n.endswith(".global_centres")}
    return ours


def _fit_position(state: State, model: nn.Module) -> State:
    """`state` with absolute positions as raster tokens of the model's grid; they were of a square grid, or are maps."""
    position = state.get("absolute_pos_embed")
    if position is None or getattr(model, "absolute_pos_embed", None) is None:
        return state
    if position.ndim == 4:  # OpenMMLab's form, (1, C, H, W)
        grid, position = tuple(position.shape[2:]), position.flatten(2).transpose(1, 2)
    elif position.shape == model.absolute_pos_embed.shape:
        return state
    else:
        side = math.isqrt(position.shape[1])
        grid = (side, side)
    if grid[0] * grid[1] != position.shape[1]:
        return state  # not a raster: the difference is listed
    return state | {"absolute_pos_embed": resize_position(position, grid, model.grid)}


def _without_classifier(ours: State, model: HierarchicalTransformer, own: State, load_head: bool) -> State:
    """Without the classifier of the checkpoint, where the model has none or is to keep its own."""
    if model.features_only:
        return {name: value for name, value in ours.items() if not re.match(r"(norm|head)\.", name)}
    if load_head:
        return ours
    ours = {name: value for name, value in ours.items() if not name.startswith("head.")}
    return ours | {name: value for name, value in own.items() if name.startswith("head.")}


def rename(state: Mapping[str, Tensor], places: list[str]) -> State:
    """Official names to ours; `places` has our prefix of every layer of stage 3. Names of ours pass unchanged."""
    whole = any(name.startswith("layers.") for name in state)  # else a layer or stage, whose norms are its own
    ours: State = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(patch_embed\.)proj\.(\d+)\.(c|bn)(\..+)", name):
            name = f"stem.stages.{int(match[2]) // 2}.{_STEM_PARTS[match[3]]}{match[4]}"
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", name)
        name = re.sub(r"^layers\.2\.semantic_token2$", "stages.2.units.0.generator.global_centres", name)
        name = re.sub(r"^layers\.(\d+)\.blocks\.(\d+)\.", lambda m: _place(int(m[1]), int(m[2]), places), name)
        # Stage 3 by itself, whose merging is another module of ours.
        name = re.sub(r"^semantic_token2$", "units.0.generator.global_centres", name)
        if places:
            name = re.sub(r"^blocks\.(\d+)\.", lambda m: _layer(places, int(m[1])), name)
        name = re.sub(r"generator\.layers\.0\.conv_pos\.proj\.0\.", "generator.conv_pos.", name)
        name = re.sub(r"^norm(\d)\.", r"norms.\1.", name) if whole else name
        ours[re.sub(r"(^|\.)layer_scale_([12])$", r"\1ls\2.gamma", name)] = value
    return ours


def _place(stage: int, layer: int, places: list[str]) -> str:
    return f"stages.2.{_layer(places, layer)}" if stage == 2 and places else f"stages.{stage}.blocks.{layer}."


def _layer(places: list[str], layer: int) -> str:
    return places[layer] if layer < len(places) else f"units.{len(places)}.layer.{layer}."


def _places_of(target: nn.Module) -> list[str]:
    """Prefix of every layer of stage 3, in order; empty where the stage has no semantic tokens."""
    stage = target.stages[2] if isinstance(target, HierarchicalTransformer) else target
    return unit_places(stage.state_dict()) if isinstance(stage, SemanticStage) else []


def unit_places(names: Iterable[str]) -> list[str]:
    """Prefixes `units.U.base.J.`, ... of the layers of a stage with semantic tokens, in the order of their use."""
    pattern = r"units\.(\d+)\.(base\.(\d+)|generator\.layers\.(\d+)|semantic\.(\d+)|recovery\.layer)\."
    order = ("base", "generator", "semantic", "recovery")
    found = {match[0]: match for name in names if (match := re.match(pattern, name))}

    def rank(prefix: str) -> tuple[int, int, int]:
        match = found[prefix]
        number = next((int(group) for group in match.groups()[2:] if group), 0)
        return int(match[1]), order.index(match[2].split(".")[0]), number

    return sorted(found, key=rank)


# ------------------------------------------------------------------ which model is it


def infer_r_swin(state: Mapping[str, Tensor], dense: bool) -> STViTRSwin:
    """The released model that a complete state dict belongs to, on the meta device.

    Raises:
        CheckpointMismatch: it is not the state of an STViT-R-Swin.
    """
    if any(name.startswith("stages.") for name in state):
        state = revert_swin(state, "official")
    sizes = _sizes(state, "patch_embed.proj.2.bn.weight", "STViT-R-Swin")
    blocks = "layers.2.blocks."
    centres = state.get("layers.2.semantic_token2")
    per_window = 3
    local = state.get(f"{blocks}3.attn.relative_position_bias_table")
    if local is not None:
        per_window = (math.isqrt(len(local)) + 1) // 2
    relative = state.get(f"{blocks}4.attn.relative_position_bias_table")
    side = math.isqrt(centres.shape[1]) if centres is not None else None
    if side is None and relative is not None:
        side = (math.isqrt(len(relative)) + 1) // 2
    with torch.device("meta"):
        size = 224 if side is None else side // per_window * sizes["window_size"] * 16
        return STViTRSwin(
            img_size=_ape_size(state, 4) or size,
            ape="absolute_pos_embed" in state,
            in_chans=state["patch_embed.proj.0.c.weight"].shape[1],
            per_window=per_window,
            use_global=centres is not None and not dense,
            relative_pos=local is not None,
            use_conv_pos=f"{blocks}1.conv_pos.proj.0.weight" in state,
            layer_scale=1e-5 if f"{blocks}1.layer_scale_1" in state else None,
            layer_scale_swin=1e-5 if f"{blocks}0.layer_scale_1" in state else None,
            features_only=dense,
            **sizes,
        )


def infer_swin(state: Mapping[str, Tensor]) -> SwinTransformer:
    """The plain Swin that a complete state dict of timm or its authors belongs to, on the meta device."""
    sizes = _sizes(state, "patch_embed.proj.bias", "Swin")
    chans, patch = state["patch_embed.proj.weight"].shape[1:3]
    with torch.device("meta"):
        size = _ape_size(state, patch)
        return SwinTransformer(size or 224, in_chans=chans, patch_size=patch, ape=size is not None, **sizes)


def _ape_size(state: Mapping[str, Tensor], patch: int) -> int | tuple[int, int] | None:
    """Pixels of the image that absolute positions are made for, if there are any."""
    position = state.get("absolute_pos_embed")
    if position is None:
        return None
    return patch * math.isqrt(position.shape[1]) if position.ndim == 3 else tuple(patch * n for n in position.shape[2:])


def _sizes(state: Mapping[str, Tensor], channels: str, model: str) -> dict[str, Any]:
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    needed = [channels, *(table.format(i) for i in range(4)), "layers.0.blocks.0.mlp.fc1.weight"]
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointMismatch(report(f"this is not the state of {model}", missing=missing))
    dim = state[channels].shape[0]
    head = state.get("head.weight", state.get("head.fc.weight"))
    return dict(
        num_classes=0 if head is None else head.shape[0],
        embed_dim=dim,
        depths=[count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(4)],
        num_heads=[state[table.format(i)].shape[1] for i in range(4)],
        window_size=(math.isqrt(len(state[table.format(0)])) + 1) // 2,
        mlp_ratio=state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in state,
    )


# ------------------------------------------------------------------ ours to others'


def revert_swin(state: Mapping[str, Tensor], layout: str) -> State:
    """Our names to those of `layout`, `official` or `timm`.

    See `stvit.checkpoint.revert`.
    """
    places = {f"stages.2.{place}": i for i, place in enumerate(unit_places(inside(state, "stages.2.")))}
    if layout == "timm" and places:
        raise CheckpointMismatch(
            report("timm has no place for layers on semantic tokens", unexpected=[n for n in state if ".units." in n])
        )
    behind = int(layout == "official")
    theirs: State = {}
    for name, value in state.items():
        if match := re.fullmatch(r"stem\.stages\.(\d+)\.(conv|norm)(\..+)", name):
            name = f"patch_embed.proj.{2 * int(match[1])}.{'c' if match[2] == 'conv' else 'bn'}{match[3]}"
        name = re.sub(r"^stem\.", "patch_embed.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - behind}.downsample.", name)
        name = re.sub(r"^stages\.2\.units\.0\.generator\.global_centres$", "layers.2.semantic_token2", name)
        name = re.sub(r"(generator\.)conv_pos\.", r"\1layers.0.conv_pos.proj.0.", name)
        place = next((p for p in places if name.startswith(p)), None)
        if place is not None:
            name = f"layers.2.blocks.{places[place]}.{name[len(place) :]}"
        name = re.sub(r"^stages\.(\d+)\.blocks\.", r"layers.\1.blocks.", name)
        name = re.sub(r"^norms\.(\d)\.", r"norm\1.", name)
        if layout == "timm":
            name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
        theirs[re.sub(r"(^|\.)ls([12])\.gamma$", r"\1layer_scale_\2", name)] = value
    foreign = [name for name in theirs if re.match(r"stages\.|patch_embed\.proj\.\d", name)]
    if layout == "official":
        foreign = [name for name in foreign if name.startswith("stages.")]
    if foreign:
        raise CheckpointMismatch(report(f"the {layout} layout has no place for", unexpected=foreign))
    return theirs
