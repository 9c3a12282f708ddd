"""SSF: a scale and a shift behind every operation of the network (sections 2.5 and 2.6)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from petl.models.methods.base import Match, Method, need
from petl.models.sites import Backbone, OnOutput


class ScaleShift(OnOutput):
    """``a y + b`` of every channel; `axis` is that of the channels."""

    def __init__(self, dim: int, axis: int = -1, std: float = 0.02) -> None:
        super().__init__()
        self.axis = axis
        self.scale = nn.Parameter(torch.empty(dim).normal_(1, std) if std else torch.ones(dim))
        self.shift = nn.Parameter(torch.empty(dim).normal_(0, std) if std else torch.zeros(dim))

    def forward(self, y: Tensor) -> Tensor:
        """Same shape."""
        if self.axis in (-1, y.ndim - 1):
            return y * self.scale + self.shift
        shape = (-1, *[1] * (y.ndim - self.axis - 1))
        return y * self.scale.view(shape) + self.shift.view(shape)


class SSF(Method):
    """Scale and shift behind every linear layer, convolution and LayerNorm outside the head.

    Args:
        std: of the initial values around 1 and 0; 0 begins at the identity.
    """

    identity: ClassVar[bool] = False

    def __init__(self, std: float = 0.02) -> None:
        self.std = std

    def match(self, backbone: Backbone) -> Match:
        """One pair for every such module."""
        found = Match()
        for place in backbone.places((nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module = ScaleShift(_channels(place.module), place.axis, self.std)
            module.attach(place)
            found.modules[place.name] = module
        return need(found, self, backbone)


def _channels(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else module.normalized_shape[0]
