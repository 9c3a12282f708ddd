"""Sizes of tensors as numbers, also while `torch.jit` records a model."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def fixed(x: Tensor, *axes: int) -> tuple[int, ...]:
    """Sizes of the axes of `x` that are the same for every input of a recorded model: all but the batch.

    While `torch.jit.trace` (and the ONNX exporter that is built on it) records, sizes are tensors: their negative
    division rounds the other way, and tables cannot be looked up by them. Elsewhere they are what `x.shape` has.
    """
    sizes = tuple(x.shape[axis] for axis in axes)
    if not torch.jit.is_tracing():
        return sizes
    with warnings.catch_warnings():  # that a number becomes part of the record is what is wanted here
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(size) for size in sizes)
