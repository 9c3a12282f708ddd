"""Losses as functions of tensors."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def generator_loss(fake: Tensor) -> Tensor:
    """The non-saturating logistic loss of logits of restored images."""
    return softplus(-fake).mean()


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The logistic loss of logits of real and of restored images."""
    return softplus(-real).mean() + softplus(fake).mean()
