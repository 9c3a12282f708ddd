"""Ways to go on with fewer tokens, by name: semantic tokens, what they are compared with, and the field's methods.

Two kinds share the registry. *Modules* take the place of the layers after the base layers (`semantic`, `pooled`,
`random`, and `all`, which keeps everything). *Layer reducers* work inside or before the ordinary layers of the full
ViT (`tome`, `evit`, `topk`, `dynamicvit`, `ats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from torch import nn

from stvit.models.controls import AllTokens, PooledTokens, RandomTokens
from stvit.models.reducers.ats import ATS
from stvit.models.reducers.dynamicvit import DynamicViT
from stvit.models.reducers.evit import EViT, TopK
from stvit.models.reducers.layerwise import LayerReducer, State
from stvit.models.reducers.matching import count_macs, match_macs, on_meta
from stvit.models.reducers.tome import ToMe
from stvit.models.tokens import SemanticTokenGenerator

REDUCERS: dict[str, type[nn.Module]] = {
    "semantic": SemanticTokenGenerator,
    "all": AllTokens,
    "pooled": PooledTokens,
    "random": RandomTokens,
    "tome": ToMe,
    "evit": EViT,
    "topk": TopK,
    "dynamicvit": DynamicViT,
    "ats": ATS,
}

__all__ = [
    "ATS",
    "REDUCERS",
    "DynamicViT",
    "EViT",
    "LayerReducer",
    "State",
    "ToMe",
    "TopK",
    "build_reducer",
    "count_macs",
    "find_reducer",
    "match_macs",
    "on_meta",
]


def find_reducer(tokens: str) -> type[nn.Module]:
    """The class of the method named `tokens`.

    Raises:
        ValueError: unknown; names the nearest.
    """
    if tokens in REDUCERS:
        return REDUCERS[tokens]
    close = get_close_matches(tokens, REDUCERS, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown tokens {tokens!r}{hint} (use one of {', '.join(REDUCERS)})")


def build_reducer(
    tokens: str,
    dim: int,
    num_heads: int,
    *,
    layers: Mapping[str, object],
    centres: Mapping[str, object],
    generation: Mapping[str, object],
    method: Mapping[str, object],
    options: Mapping[str, object],
) -> tuple[nn.Module, LayerReducer | None]:
    """The middle layers of a plain ViT for the method named `tokens`, and the method itself if it is a layer reducer.

    Args:
        tokens: a name in `REDUCERS`.
        dim: channels C.
        num_heads: attention heads.
        layers: number, stochastic depth and further arguments of the middle layers.
        centres: `grid` and `pool` of methods that pool; `random` keeps as many tokens.
        generation: further arguments of `SemanticTokenGenerator`.
        method: `depth`, `class_token` and `registers` (further tokens in front) of layer reducers.
        options: further arguments of the method.

    Raises:
        ValueError: unknown method or option.
    """
    kind = find_reducer(tokens)
    try:
        if issubclass(kind, LayerReducer):
            own = {name: value for name, value in method.items() if name != "registers"}
            reduction = kind(dim, **own, **options)
            reduction.prefix += method.get("registers", 0)
            return AllTokens(dim, num_heads, **layers), reduction
        if kind is SemanticTokenGenerator:
            return kind(dim, num_heads, **centres, **generation, **layers, **options), None
        if kind is PooledTokens:
            return kind(dim, num_heads, **centres, **layers, **options), None
        if kind is RandomTokens:
            height, width = centres["grid"]
            return kind(dim, num_heads, **{"num_tokens": height * width, **options}, **layers), None
        return kind(dim, num_heads, **layers, **options), None
    except TypeError as error:
        if not options:
            raise
        raise ValueError(f"token_options={dict(options)} do not fit tokens={tokens!r}: {error}") from error
