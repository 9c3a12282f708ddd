"""A semantic-token ViT of a few thousand weights, with every option that changes what is computed."""

from __future__ import annotations

import pytest

from stvit.models import SemanticTokenViT

TINY = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=32, depth=5, num_heads=2, base_depth=2, token_grid=2)
# Every way to build the model that changes what is computed.
VARIANTS = {
    "default": {},
    "max": dict(pool="max"),
    "avg": dict(pool="avg"),
    "weighted": dict(pool="weighted"),
    "no_global": dict(use_global=False),
    "global_only": dict(pool="none"),
    "global_in_key": dict(global_in="key"),
    "no_shortcut": dict(shortcut=False, layer_scale=0.1),
    "stgm3": dict(stgm_depth=3),
    "rectangular_grid": dict(token_grid=(2, 3)),
    "learned": dict(token_position="learned"),
    "conv": dict(token_position="conv"),
    "relative": dict(token_position="relative"),
    "conv_stem": dict(stem="conv"),
    "half_conv_stem": dict(stem="half_conv", residual_scale=0.5),
    "all": dict(tokens="all"),
    "class_token": dict(tokens="all", class_token=True),
    "pooled": dict(tokens="pooled"),
    "random": dict(tokens="random"),
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**options: object) -> SemanticTokenViT:
    return SemanticTokenViT(**(TINY | options))
