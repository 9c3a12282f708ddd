"""State dicts of others to ours and back.

Layouts that are read, recognised by their keys (also for single layers and pieces):

- plain ViTs: the reference's and DeiT's (see `stvit.checkpoint.vit`);
- Swin: the released STViT-R-Swin classifier and its detection backbone, alone or in a detector (prefix `backbone.`),
  and plain Swin as timm or its authors store it (see `stvit.checkpoint.swin`);
- for video models: image Swins, whose weights are inflated, and Video Swin as torchvision or its authors store it (see
  `stvit.checkpoint.video`).

Every function is strict: what is left over, missing or of another shape raises `CheckpointMismatch` with all names.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from core.checkpoint.fitting import CheckpointMismatch
from stvit.checkpoint.state import State, resize_relative_bias, unwrap
from stvit.checkpoint.swin import convert_swin, from_swin, is_hierarchical, revert_swin
from stvit.checkpoint.video import VIDEO_TARGETS, is_video, video_weights
from stvit.checkpoint.vit import convert_vit, from_deit, revert_vit
from stvit.models.dumbbell import SemanticStage
from stvit.models.hierarchy import HierarchicalTransformer
from stvit.models.swin_block import SwinBlock
from stvit.models.video_swin import ClipClassifier

TARGETS = ("vit", "semantic", "classification", "dense", "detector", *VIDEO_TARGETS)
LAYOUTS = ("reference", "deit", "official", "timm")

_SEMANTIC_TABLE = "the layer works on semantic tokens, without the relative positions of image tokens"

# Entries of published files that have no place in some of our models, with the reason (for `tools/convert.py`).
DROPPED = {
    "neck.*": "part of the detector, not of the backbone (target=detector keeps it)",
    "rpn_head.*": "part of the detector, not of the backbone (target=detector keeps it)",
    "roi_head.*": "part of the detector, not of the backbone (target=detector keeps it)",
    "norm.*": "final norm of the classifier; dense backbones have a norm per stage",
    "head.*": "classifier; dense backbones have none, and video models their own unless it is of as many classes",
    "cls_head.*": "classifier of another number of classes; the target keeps its own",
    "layers.2.semantic_token2": "global centres; the target has none",
    "patch_embed.*": "Swin's patch projection; the target has the convolutional stem",
    "layers.*.relative_position_bias_table": _SEMANTIC_TABLE,
    "backbone.layers.*.relative_position_bias_table": _SEMANTIC_TABLE,
    "features.*.relative_position_bias_table": _SEMANTIC_TABLE,
    "cls_token": "class token; the target averages its tokens",
    "aux_head.*": "LV-ViT's classifier of single tokens; the target has none",
}

__all__ = [
    "DROPPED",
    "LAYOUTS",
    "TARGETS",
    "VIDEO_TARGETS",
    "CheckpointMismatch",
    "convert",
    "from_deit",
    "from_swin",
    "resize_relative_bias",
    "revert",
    "video_weights",
]


def convert(
    state: Mapping[str, Tensor],
    target: nn.Module | str | None = None,
    *,
    base_depth: int = 4,
    stgm_depth: int = 2,
    load_head: bool | None = None,
    inflation: str = "mean",
) -> State:
    """Translate a state dict to our names.

    Args:
        state: name to tensor; the content of a file (`{"model": state}`, `{"state_dict": state}`) is unwrapped.
        target: the module that is to be loaded (a model or one of its pieces), or what it is:

            - `vit`: a plain ViT, inferred from names and shapes;
            - `semantic`: likewise, without a class token and its position, so that a DeiT checkpoint becomes the start
              of a model with semantic tokens (whose pooling, global centres and positions are not in it: see
              `from_deit`);
            - `classification`, `dense`: STViT-R-Swin, inferred likewise. A classification checkpoint becomes the start
              of a dense backbone, whose output norms are not in it (with a module as target they are the module's);
            - `detector`: a whole detector; the names of its backbone are translated, the others kept;
            - a video model: `video_swin_tiny`, `stvit_video_swin_tiny`, or likewise `small` or `base`. What the source
              lacks (a classifier of as many classes, learned pooling) is left out.

            None: inferred from the keys, if they are those of an image model.
        base_depth: base layers of a plain ViT, where `target` does not say.
        stgm_depth: generation layers of a plain ViT, where `target` does not say.
        load_head: False keeps the classifier of a target module (another number of classes). None: a video model takes
            that of another video model with as many classes, an image model always the source's.
        inflation: of the patches of images in time, for video models: `mean` (every frame alike) or `centre`.

    Returns:
        A new dict that `target.load_state_dict` takes with `strict=True`; tensors are views where nothing changed.

    Raises:
        CheckpointMismatch: entries are missing, left over or of another shape.
        ValueError: unknown target or inflation.
    """
    if isinstance(target, str) and target not in TARGETS:
        listed = ", ".join(f"'{name}'" for name in TARGETS)
        raise ValueError(f"unknown target {target!r}: use one of {listed} or pass the module to be loaded")
    state = unwrap(state)
    if isinstance(target, ClipClassifier) or (isinstance(target, str) and target in VIDEO_TARGETS):
        return video_weights(state, target, load_head=load_head, inflation=inflation)
    if target is None and is_video(state):
        raise ValueError(f"these are weights of a video model: name the target, one of {', '.join(VIDEO_TARGETS)}")
    load_head = load_head is not False
    swin = isinstance(target, HierarchicalTransformer | SemanticStage | SwinBlock)
    if swin or target in ("classification", "dense", "detector") or (target is None and is_hierarchical(state)):
        return convert_swin(state, target, load_head=load_head)
    return convert_vit(state, "vit" if target is None else target, base_depth=base_depth, stgm_depth=stgm_depth)


def revert(state: Mapping[str, Tensor], *, layout: str = "reference") -> State:
    """Translate our state dict (of a model or one of its pieces) back.

    Args:
        state: name to tensor.
        layout: `reference`: of plain ViTs, and for hierarchical models the same as `official`; `official`: the released
            STViT-R-Swin (its index and mask buffers, which it computes, are left out), for plain Swin its authors'
            files; `timm` (or `deit`): timm's, for models without semantic tokens.

    Raises:
        CheckpointMismatch: parts that the layout has no place for.
        ValueError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    if is_hierarchical(state):
        return revert_swin(state, "timm" if layout in ("timm", "deit") else "official")
    return revert_vit(state, "deit" if layout in ("timm", "deit") else "reference")
