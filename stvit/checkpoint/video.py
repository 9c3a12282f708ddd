"""Weights of image and video Swins for the video models here (Video Swin, section 3.3: initialisation from images).

Layouts that are read, recognised by their names:

- image Swin of timm 1.x (`layers.{i+1}.downsample` follows stage i) and of Swin's own files (`layers.{i}.downsample`);
- Video Swin of torchvision (`features.N`) and of its own files (`layers.{i}`, also below `backbone.` and `cls_head.`).

Ours: `stem`, `stages.I.{downsample, blocks.J}`, in the stage with semantic tokens `{base.J, generator.layers.J,
semantic.J}`, `norm`, `head`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from einops import repeat
from torch import Tensor

from core.checkpoint.fitting import CheckpointMismatch, fit
from stvit.checkpoint.state import State, resize_relative_bias, split_qkv, unwrap
from stvit.models.stvit_video import (
    SemanticClipStage,
    SemanticTailStage,
    stvit_video_swin_base,
    stvit_video_swin_small,
    stvit_video_swin_tiny,
)
from stvit.models.video_swin import ClipClassifier, video_swin_base, video_swin_small, video_swin_tiny

#: What can be named as a target of a conversion.
VIDEO_TARGETS: dict[str, Callable[[], ClipClassifier]] = {
    "video_swin_tiny": video_swin_tiny,
    "video_swin_small": video_swin_small,
    "video_swin_base": video_swin_base,
    "stvit_video_swin_tiny": stvit_video_swin_tiny,
    "stvit_video_swin_small": stvit_video_swin_small,
    "stvit_video_swin_base": stvit_video_swin_base,
}
INFLATIONS = ("mean", "centre")
_TABLE, _PATCHES = ".relative_position_bias_table", "stem.proj.weight"


def video_weights(
    state: Mapping[str, Tensor],
    target: ClipClassifier | str,
    *,
    load_head: bool | None = None,
    inflation: str = "mean",
) -> State:
    """Weights for a video model from an image Swin or a Video Swin.

    Image weights are inflated: every frame of a patch gets the same filter, divided by the number of frames, and every
    offset in time the same table of offsets in space. A video of one repeated picture then has the picture's features.

    Layers that go on with semantic tokens take the weights of the layers in their place, without their position tables;
    per-channel scales, which Swin has not, start at 1. What the source lacks besides (pooling of tokens, position
    tables of semantic tokens, a classifier of other classes) stays as the model has it.

    Args:
        state: the source's state dict, or the content of a file.
        target: a `VideoSwin` or `STViTVideoSwin`, or one of `VIDEO_TARGETS`.
        load_head: whether the classifier is taken over; None: where the source is a video model with as many classes.
        inflation: of image patches in time: `mean` (every frame alike) or `centre` (the middle frame alone).

    Returns:
        A dict that `target.load_state_dict` takes with `strict=True`. For a name, or a model on the meta device, what
        the source lacks is left out (`load_from.ignore` in a config).

    Raises:
        CheckpointMismatch: entries are missing, left over or of another shape.
        ValueError: unknown target or inflation.
    """
    if inflation not in INFLATIONS:
        raise ValueError(f"unknown inflation {inflation!r}: use one of {', '.join(INFLATIONS)}")
    model = _on_meta(target) if isinstance(target, str) else target
    plain = _plain_names(unwrap(state))
    image = _PATCHES in plain and plain[_PATCHES].ndim == 4
    if load_head is None:
        classes = len(plain["head.weight"]) if "head.weight" in plain else None
        load_head = not image and classes == model.num_classes
    own = model.state_dict()
    semantic = _semantic_layers(model)
    ours: State = {}
    for name, value in plain.items():
        name = _place(name, model)
        if (name.startswith("head.") and not load_head) or (name.endswith(_TABLE) and name.startswith(semantic)):
            continue
        if image and name.endswith(_TABLE) and name in own:
            value = _inflate_table(value, model.get_submodule(name.rpartition(".")[0]).window)
        if image and name == _PATCHES:
            value = _inflate_patches(value, model.stem.patch_size[0], inflation)
        ours[name] = value
    ours = split_qkv(ours, own)
    ours |= {n: torch.ones(v.shape) for n, v in own.items() if re.search(r"\.ls[12]\.gamma$", n) and n not in ours}
    lacking = [
        name
        for name in own
        if name not in ours
        and (
            ".generator.pool." in name
            or (name.startswith("head.") and not load_head)
            or (name.endswith(_TABLE) and name.startswith(semantic))
        )
    ]
    ours |= {name: own[name] for name in lacking if own[name].device.type != "meta"}
    return fit(ours, model, own={name: value for name, value in own.items() if name in ours or name not in lacking})


def is_video(state: Mapping[str, Tensor]) -> bool:
    """Whether there are patches with an axis of time, in any layout."""
    return any(
        v.ndim == 5 and re.fullmatch(r"(backbone\.)?(patch_embed|stem)\.proj\.weight", n) for n, v in state.items()
    )


def _on_meta(name: str) -> ClipClassifier:
    if name not in VIDEO_TARGETS:
        raise ValueError(f"unknown target {name!r}: use one of {', '.join(VIDEO_TARGETS)}, or pass the model")
    with torch.device("meta"):
        return VIDEO_TARGETS[name]()


def _plain_names(state: Mapping[str, Tensor]) -> State:
    """One layout for all: `stages.I.{downsample, blocks.J}` (merging before the layers), `stem`, `norm`, `head`."""
    state = {re.sub(r"^(backbone|cls_head)\.", "", name): value for name, value in state.items()}
    behind = "layers.0.downsample.norm.weight" in state  # merging is numbered with the stage before it
    plain: State = {}
    for name, value in state.items():
        if match := re.fullmatch(r"features\.(\d+)\.(.+)", name):
            stage, merging = divmod(int(match[1]), 2)
            name = f"stages.{stage + 1}.downsample.{match[2]}" if merging else f"stages.{stage}.blocks.{match[2]}"
            name = re.sub(r"\.mlp\.([03])\.", lambda m: f".mlp.fc{1 if m[1] == '0' else 2}.", name)
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + behind}.downsample.", name)
        name = re.sub(r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks.", name)
        name = re.sub(r"^patch_embed\.", "stem.", name)
        plain[re.sub(r"^(head\.fc|fc_cls)\.", "head.", name)] = value
    return plain


def _place(name: str, model: ClipClassifier) -> str:
    """Where a layer's entry lies in `model`: a stage with semantic tokens has its layers in three lists."""
    match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name)
    stage = model.stages[int(match[1])] if match and int(match[1]) < len(model.stages) else None
    if not isinstance(stage, SemanticClipStage):
        return name
    layer = int(match[2])
    for part, layers in (("base", stage.base), ("generator.layers", stage.generator.layers)):
        if layer < len(layers):
            return f"stages.{match[1]}.{part}.{layer}.{match[3]}"
        layer -= len(layers)
    return f"stages.{match[1]}.semantic.{layer}.{match[3]}"


def _semantic_layers(model: ClipClassifier) -> tuple[str, ...]:
    """Prefixes of the layers whose tokens are semantic."""
    prefixes: list[str] = []
    for index, stage in enumerate(model.stages):
        if isinstance(stage, SemanticClipStage):
            prefixes += [f"stages.{index}.generator.", f"stages.{index}.semantic."]
        elif isinstance(stage, SemanticTailStage):
            prefixes.append(f"stages.{index}.blocks.")
    return tuple(prefixes)


def _inflate_patches(weight: Tensor, frames: int, inflation: str) -> Tensor:
    """Filters `(C, in, h, w)` of image patches as `(C, in, frames, h, w)`."""
    if inflation == "mean":
        return repeat(weight / frames, "c i h w -> c i t h w", t=frames)
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


def _inflate_table(table: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Bias table of image windows for clips: resampled to the window's side and repeated for every offset in time."""
    if window[1] != window[2] and len(table) != math.prod(2 * side - 1 for side in window[1:]):
        raise CheckpointMismatch(f"image windows are square, those of the model {window[1]}x{window[2]}")
    if window[1] == window[2]:
        table = resize_relative_bias(table, window[1])
    return repeat(table, "s h -> (t s) h", t=2 * window[0] - 1)
