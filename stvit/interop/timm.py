"""The models under timm's names: `timm.create_model("stvit_r_swin_small_window7_224")`.

`import stvit` is enough to have them. Every argument of our constructors can be given to `create_model`. Weights come
from any file that `stvit.checkpoint` reads, with whatever prefix, so that plain DeiT and Swin checkpoints are a start
(`checkpoint_path=` takes them, too):

    timm.create_model("stvit_deit_small_patch16_224", pretrained=True,
                      pretrained_cfg_overlay=dict(file="deit_small_patch16_224.pth"))

`pretrained=True` alone loads the released weights of STViT-R-Swin-S and -B; none exist for the others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stvit.models import LVViT, SemanticTokenViT, STViTRSwin, STViTSwin

__all__: list[str] = []  # timm adds the names that are registered


def _cfg(first_conv: str, **more: object) -> dict[str, object]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        "license": "mit",
    } | more


def _released(filename: str) -> dict[str, object]:
    return _cfg("stem.stages.0.conv", hf_hub_id="csncsn/STViT-R", hf_hub_filename=filename)


default_cfgs = generate_default_cfgs(
    {
        "stvit_deit_tiny_patch16_224.untrained": _cfg("stem.proj"),
        "stvit_deit_small_patch16_224.untrained": _cfg("stem.proj"),
        "stvit_deit_base_patch16_224.untrained": _cfg("stem.proj"),
        "lvvit_small_patch16_224.untrained": _cfg("stem.stages.0.conv", crop_pct=0.9, classifier=("head", "aux_head")),
        "lvvit_medium_patch16_224.untrained": _cfg("stem.stages.0.conv", crop_pct=1.0, classifier=("head", "aux_head")),
        "stvit_lvvit_small_patch16_224.untrained": _cfg("stem.stages.0.conv", crop_pct=0.9),
        "stvit_lvvit_medium_patch16_224.untrained": _cfg("stem.stages.0.conv", crop_pct=1.0),
        "stvit_swin_tiny_window7_224.untrained": _cfg("stem.stages.0.conv"),
        "stvit_swin_small_window7_224.untrained": _cfg("stem.stages.0.conv"),
        "stvit_swin_base_window7_224.untrained": _cfg("stem.stages.0.conv"),
        "stvit_r_swin_tiny_window7_224.untrained": _cfg("stem.stages.0.conv"),
        "stvit_r_swin_small_window7_224.in1k": _released("STViT-R-Swin-S.pth"),
        "stvit_r_swin_base_window7_224.in1k": _released("STViT-R-Swin-B.pth"),
    }
)


@register_model
def stvit_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> SemanticTokenViT:
    """STViT-DeiT-T: 16 semantic tokens after 4 layers; arguments as in `SemanticTokenViT`."""
    return _create("stvit_deit_tiny_patch16_224", "stvit_deit_tiny", pretrained, kwargs)


@register_model
def stvit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> SemanticTokenViT:
    """STViT-DeiT-S: 16 semantic tokens after 4 layers; arguments as in `SemanticTokenViT`."""
    return _create("stvit_deit_small_patch16_224", "stvit_deit_small", pretrained, kwargs)


@register_model
def stvit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> SemanticTokenViT:
    """STViT-DeiT-B: 16 semantic tokens after 4 layers; arguments as in `SemanticTokenViT`."""
    return _create("stvit_deit_base_patch16_224", "stvit_deit_base", pretrained, kwargs)


@register_model
def lvvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S, without reduction; arguments as in `LVViT`."""
    return _create("lvvit_small_patch16_224", "lvvit_small", pretrained, kwargs)


@register_model
def lvvit_medium_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M, without reduction; arguments as in `LVViT`."""
    return _create("lvvit_medium_patch16_224", "lvvit_medium", pretrained, kwargs)


@register_model
def stvit_lvvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S with 36 semantic tokens after 5 layers; arguments as in `LVViT`."""
    return _create("stvit_lvvit_small_patch16_224", "stvit_lvvit_small", pretrained, kwargs)


@register_model
def stvit_lvvit_medium_patch16_224(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M with 36 semantic tokens after 6 layers; arguments as in `LVViT`."""
    return _create("stvit_lvvit_medium_patch16_224", "stvit_lvvit_medium", pretrained, kwargs)


@register_model
def stvit_swin_tiny_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-Swin-T: 16 semantic tokens per window; arguments as in `STViTSwin`."""
    return _create("stvit_swin_tiny_window7_224", "stvit_swin_tiny", pretrained, kwargs)


@register_model
def stvit_swin_small_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-Swin-S: 16 semantic tokens per window; arguments as in `STViTSwin`."""
    return _create("stvit_swin_small_window7_224", "stvit_swin_small", pretrained, kwargs)


@register_model
def stvit_swin_base_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-Swin-B: 16 semantic tokens per window; arguments as in `STViTSwin`."""
    return _create("stvit_swin_base_window7_224", "stvit_swin_base", pretrained, kwargs)


@register_model
def stvit_r_swin_tiny_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTRSwin:
    """STViT-R-Swin-T; arguments as in `STViTRSwin`; with `features_only=True` maps of the four stages."""
    return _create("stvit_r_swin_tiny_window7_224", "stvit_r_swin_tiny", pretrained, kwargs)


@register_model
def stvit_r_swin_small_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTRSwin:
    """STViT-R-Swin-S; arguments as in `STViTRSwin`; with `features_only=True` maps of the four stages."""
    return _create("stvit_r_swin_small_window7_224", "stvit_r_swin_small", pretrained, kwargs)


@register_model
def stvit_r_swin_base_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTRSwin:
    """STViT-R-Swin-B; arguments as in `STViTRSwin`; with `features_only=True` maps of the four stages."""
    return _create("stvit_r_swin_base_window7_224", "stvit_r_swin_base", pretrained, kwargs)


def _create(variant: str, build: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    import stvit.models  # here, because this module may be imported while stvit.models is

    for name, own in _TIMM_NAMES.items():
        if name in kwargs:
            value = kwargs.pop(name)
            kwargs |= {own: value} if own else {}
    for name, reason in _REFUSED.items():
        if kwargs.pop(name, None):
            raise ValueError(f"{name} does not go with {variant}: {reason}")
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if "stem" in kwargs:
        overlay.setdefault(
            "first_conv",
            {"patch": "stem.proj", "conv": "stem.stages.0.conv", "half_conv": "stem.stages.0.conv"}.get(kwargs["stem"]),
        )
    if pretrained:
        overlay |= _weights(variant, kwargs.get("pretrained_cfg"), overlay)
    model = build_model_with_cfg(
        getattr(stvit.models, build),
        variant,
        pretrained,
        pretrained_filter_fn=_ours,
        pretrained_cfg_overlay=overlay,
        # As timm has it: the last layers of a ViT, all stages of the others.
        feature_cfg=dict(out_indices=3 if "_patch16_" in variant else (0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )
    model.pretrained_cfg.pop("state_dict", None)
    model.register_load_state_dict_pre_hook(_translate)
    return model


# timm's names of arguments that are called otherwise here, or that name what our models do anyway (None).
_TIMM_NAMES = {"init_values": "layer_scale", "dynamic_img_size": None, "dynamic_img_pad": None, "strict_img_size": None}
_REFUSED = {
    "patch_drop_rate": "tokens are pooled from the whole grid of patches",
}


def _translate(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`: files of others load, too, by timm's `checkpoint_path` for example."""
    if not prefix and any(re.search(r"(^|\.)patch_embed\.|\.stem\.", name) for name in state):
        ours = _ours(state, model)
        state.clear()
        state.update(ours)


def _weights(variant: str, cfg: Any, overlay: Mapping[str, Any]) -> dict[str, object]:
    """The content of the weight file, read as data: published files hold more than timm would read.

    Empty where timm itself knows what to do (a state dict, a URL, nothing).
    """
    found = resolve_pretrained_cfg(variant, pretrained_cfg=cfg, pretrained_cfg_overlay=dict(overlay))
    if found.state_dict or not (found.file or found.hf_hub_id):
        return {}
    path = found.file
    if not path:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(found.hf_hub_id, filename=found.hf_hub_filename or "pytorch_model.bin")
    from core.checkpoint import load_official

    return {"state_dict": load_official(path)}


def _ours(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint under our names, with its own classifier and input channels; timm adapts these afterwards."""
    from stvit.checkpoint import convert, from_deit
    from stvit.checkpoint.state import inside, unwrap
    from stvit.models import SemanticTokenViT

    state = unwrap(state)
    state = inside(state, "backbone.") if all(name.startswith("backbone.") for name in state) else state
    template = copy.deepcopy(model)
    head = next((state[name] for name in ("head.weight", "head.fc.weight") if name in state), None)
    if head is not None:
        template.reset_classifier(len(head))
    stems = ("patch_embed.proj.weight", "patch_embed.proj.0.c.weight", "patch_embed.conv1.weight")
    stems += ("stem.proj.weight", "stem.stages.0.conv.weight")
    first = template.get_submodule(model.pretrained_cfg["first_conv"])
    for name in stems:
        if name in state and state[name].shape[2:] == first.weight.shape[2:]:
            first.weight.data = first.weight.data.new_empty(state[name].shape)
    convert_to = from_deit if isinstance(template, SemanticTokenViT) else convert
    return convert_to(state, template, load_head=head is not None)
