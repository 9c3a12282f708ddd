"""Computing in float32 where half precision would do harm."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it has at least that precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Within it, nothing on the tensor's device is cast to half precision."""
    if tensor.device.type == "meta":  # counting only; autocast does not know that device
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
