"""Masks and index tables that follow from sizes alone: made once per size and device, then remembered."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


def derived(build: Callable[..., Any], like: Tensor, *sizes: Any) -> Any:
    """`build(*sizes, device)` on the device of `like`, from memory where it was made before.

    Modules stay free of state: nothing of it is saved, copied or moved with them, and layers of one geometry share one
    table. While a graph is traced (compilation, export, fake tensors) nothing is remembered, so that the tables become
    part of the graph and never leak out of it.

    Args:
        build: makes a tensor, or a tuple of tensors and None, from hashable `sizes` and `device=`.
        like: an ordinary tensor on the device wanted.
        sizes: hashable arguments of `build`.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return build(*sizes, device=like.device)
    # Tensors made in inference mode cannot be used in training, so either mode has its own.
    return _remembered(build, sizes, like.device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=64)
def _remembered(build: Callable[..., Any], sizes: tuple[Any, ...], device: torch.device, inference: bool) -> Any:
    return build(*sizes, device=device)
