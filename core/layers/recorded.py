"""What models do differently while `torch.jit` records them: `torch.jit.trace`, and ONNX's older exporter on top of it.

Sizes are tensors then: they cannot be rounded, tables cannot be looked up by them, and their negative division rounds
the other way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def fixed(x: Tensor, *axes: int) -> tuple[int, ...]:
    """Sizes of the axes of `x` that are the same for every input of a recorded model, as numbers: all but the batch.

    Elsewhere they are what `x.shape` has.
    """
    sizes = tuple(x.shape[axis] for axis in axes)
    if not torch.jit.is_tracing():
        return sizes
    with warnings.catch_warnings():  # that a number becomes part of the record is what is wanted here
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(size) for size in sizes)


def constant(build: Callable[[], Tensor]) -> Tensor:
    """`build()`, which depends on no input: in a record its result, not the way to it."""
    if not torch.jit.is_tracing():
        return build()
    # What is recorded is what this thread does.
    with ThreadPoolExecutor(1) as other:
        return other.submit(torch.no_grad()(build)).result()
