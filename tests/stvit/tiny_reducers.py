"""A tiny ViT with every token reducer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stvit.models import SemanticTokenViT

TINY = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=32, depth=4, num_heads=2, base_depth=1, token_grid=3)
METHODS = {
    "tome": ("tome", dict(r=6)),
    "tome_tilted": ("tome", dict(r=4, inflect=-1.0, proportional=False)),
    "evit": ("evit", dict(keep_rate=0.5)),
    "topk": ("topk", dict(keep_rate=0.5)),
    "dynamicvit": ("dynamicvit", dict(keep_ratio=0.6)),
    "ats": ("ats", dict(keep_rate=0.6)),
    "random": ("random", dict(num_tokens=20)),
    "pooled": ("pooled", {}),
}
each_method = pytest.mark.parametrize("method", METHODS)
with_and_without_class_token = pytest.mark.parametrize("class_token", [True, False], ids=["class", "mean"])


def tiny(tokens: str, class_token: bool = False, options: dict | None = None, **more: object) -> SemanticTokenViT:
    options = dict(options or {})
    if tokens == "evit" and not class_token:
        options.setdefault("score", "attention")
    return SemanticTokenViT(**(TINY | more), tokens=tokens, class_token=class_token, token_options=options)


def build(method: str, class_token: bool = False, **more: object) -> SemanticTokenViT:
    tokens, options = METHODS[method]
    return tiny(tokens, class_token, options, **more)


def lively(model: nn.Module) -> nn.Module:
    """Weights large enough that tokens, attention and scores differ clearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def token_counts(model: nn.Module, images: Tensor) -> list[int]:
    """How many tokens leave each layer of a reduced ViT."""
    sizes: list[int] = []
    for layer in [*model.base, *model.reducer.layers, *model.tail]:
        layer.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape[1]))
    model(images)
    return sizes
