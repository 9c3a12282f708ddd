"""What a backward pass has left behind, asked in one way by every test."""

from __future__ import annotations

from torch import nn


def unreached(module: nn.Module) -> list[str]:
    """Names of trained parameters whose gradient is absent, zero throughout, or not finite."""
    return [
        name
        for name, value in module.named_parameters()
        if value.requires_grad and not (value.grad is not None and value.grad.isfinite().all() and value.grad.any())
    ]
