"""Masks and index tables that follow from sizes alone: made once per size and device, then remembered."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn


def derived(build: Callable[..., Any], like: Tensor, *sizes: Any) -> Any:
    """`build(*sizes, device)` on the device of `like`, from memory where it was made before.

    Modules stay free of state: nothing of it is saved, copied or moved with them, and layers of one geometry share one
    table. While a graph is compiled (or tensors are fake) nothing is remembered, so that the tables become part of the
    graph and never leak out of it. In an export they are constants: a model that has left does not make them anew.

    Args:
        build: makes a tensor, or a tuple of tensors and None, from hashable `sizes` and `device=`.
        like: an ordinary tensor on the device wanted.
        sizes: hashable arguments of `build`.
    """
    if torch.jit.is_tracing() or (torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()):
        return _unseen(partial(build, *sizes, device=like.device))
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return build(*sizes, device=like.device)
    # Tensors made in inference mode cannot be used in training, so either mode has its own.
    return _remembered(build, sizes, like.device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=64)
def _remembered(build: Callable[..., Any], sizes: tuple[Any, ...], device: torch.device, inference: bool) -> Any:
    return build(*sizes, device=device)


def constant(build: Callable[[], Tensor]) -> Tensor:
    """`build()`, which depends on weights but on no input: a constant in a record of `torch.jit`.

    ONNX' older exporter, which is built on such records, then needs no operators that only positions are resampled by.
    """
    return _unseen(build) if torch.jit.is_tracing() else build()


def _unseen(build: Callable[[], Any]) -> Any:
    """`build()` by another thread: records and exports are of what their own does."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(torch.no_grad()(build)).result()
