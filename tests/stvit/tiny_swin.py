"""Swin, STViT-Swin and STViT-R-Swin of a few thousand weights, with every option that changes what is computed."""

from __future__ import annotations

import pytest

from stvit.models import STViTRSwin, STViTSwin, SwinTransformer
from stvit.models.hierarchy import HierarchicalTransformer

TINY = dict(embed_dim=8, depths=(1, 2, 6, 2), num_heads=(1, 2, 2, 4), num_classes=5, img_size=224)
# Every way to build the models that changes what is computed.
VARIANTS: dict[str, tuple[type[HierarchicalTransformer], dict[str, object]]] = {
    "swin": (SwinTransformer, {}),
    "swin_conv": (SwinTransformer, dict(stem="conv", layer_scale=0.1)),
    "swin_dense": (SwinTransformer, dict(features_only=True)),
    "stvit": (STViTSwin, {}),
    "stvit_9": (STViTSwin, dict(per_window=3, base_depth=1, stgm_depth=3, layer_scale=0.1)),
    "stvit_options": (
        STViTSwin,
        dict(
            use_global=True,
            relative_pos=True,
            use_conv_pos=True,
            learned_pos=True,
            stem="patch",
            key_windows=(10, None),
            pool="weighted",
        ),
    ),
    "r": (STViTRSwin, dict(layer_scale=0.1)),
    "r_options": (
        STViTRSwin,
        dict(use_global=True, relative_pos=True, use_conv_pos=True, shortcut=True, stem="patch", layer_scale_swin=0.1),
    ),
    "r_two_units": (
        STViTRSwin,
        dict(depths=(1, 1, 12, 1), use_global=True, global_in="both-units", per_window=2, layer_scale=None),
    ),
    "r_reuse": (
        STViTRSwin,
        dict(depths=(1, 1, 12, 1), recover="reuse", layer_scale=0.1, pool="weighted_offset", use_conv_pos=True),
    ),
    "r_once": (STViTRSwin, dict(depths=(1, 1, 12, 1), recover="once", local_global="global", layer_scale=0.1)),
    "r_none": (STViTRSwin, dict(recover="none", layer_scale=0.1)),
    "r_other_unit": (
        STViTRSwin,
        dict(depths=(1, 1, 7, 1), base_depth=2, stgm_depth=1, semantic_depth=3, layer_scale=0.1),
    ),
    "dense": (STViTRSwin, dict(features_only=True, layer_scale=0.1)),
    "dense_official": (STViTRSwin, dict(features_only=True, mask_mode="official", layer_scale=0.1)),
    "dense_4": (
        STViTRSwin,
        dict(features_only=True, per_window=4, key_windows=(9, None, None), pool="avg", local_global="local"),
    ),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant: str, **options: object) -> HierarchicalTransformer:
    cls, own = VARIANTS[variant]
    return cls(**(TINY | own | options))
