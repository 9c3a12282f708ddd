"""Methods that add nothing: they train some of the backbone's own parameters."""

from __future__ import annotations

from torch import nn

from petl.models.methods.base import Match, Method, need
from petl.models.sites import Backbone


class Linear(Method):
    """The classifier alone."""

    def match(self, backbone: Backbone) -> Match:
        """Nothing: the head is trained with every method."""
        return Match()


class Full(Method):
    """Every parameter."""

    def match(self, backbone: Backbone) -> Match:
        """All names outside the head."""
        names = [name for name, _ in backbone.model.named_parameters() if not backbone.in_head(name)]
        return need(Match(trained=names), self, backbone)


class Partial(Method):
    """The last `k` blocks and what comes behind them (the final norm).

    Raises:
        ValueError: `k` is below 1, or the network has fewer blocks.
    """

    def __init__(self, k: int = 1) -> None:
        if k < 1:
            raise ValueError(f"k={k}: at least one block")
        self.k = k

    def match(self, backbone: Backbone) -> Match:
        """The blocks' parameters, and those registered behind the last block outside the head."""
        if self.k > len(backbone.blocks):
            raise ValueError(f"k={self.k}: the network has {len(backbone.blocks)} blocks")
        tuned = tuple(f"{block.block.name}." for block in backbone.blocks[-self.k :])
        names = [name for name, _ in backbone.model.named_parameters()]
        last = max(index for index, name in enumerate(names) if name.startswith(tuned[-1]))
        trained = [
            name
            for index, name in enumerate(names)
            if not backbone.in_head(name) and (name.startswith(tuned) or index > last)
        ]
        return need(Match(trained=trained), self, backbone)


class BitFit(Method):
    """Every bias: of linear layers, convolutions and norms."""

    def match(self, backbone: Backbone) -> Match:
        """Parameters that a module holds as its `bias`."""
        trained = [
            f"{name}.bias"
            for name, module in backbone.model.named_modules()
            if isinstance(getattr(module, "bias", None), nn.Parameter) and not backbone.in_head(name)
        ]
        return need(Match(trained=trained), self, backbone)


class LNTune(Method):
    """Stage 1 of the paper (section 2.2): scales and shifts of every LayerNorm, found by type.

    Args:
        tune: `norm`, both; `norm_scale`; `norm_shift`.

    Raises:
        ValueError: an unknown `tune`.
    """

    def __init__(self, tune: str = "norm") -> None:
        if tune not in ("norm", "norm_scale", "norm_shift"):
            raise ValueError(f"tune='{tune}' is none of ['norm', 'norm_scale', 'norm_shift']")
        self.tune = tune

    def match(self, backbone: Backbone) -> Match:
        """`weight` and `bias` of every `nn.LayerNorm`; norms without parameters and identities have none."""
        leaves = {"norm": ("weight", "bias"), "norm_scale": ("weight",), "norm_shift": ("bias",)}[self.tune]
        trained = [
            f"{place.name}.{leaf}"
            for place in backbone.places(nn.LayerNorm)
            for leaf in leaves
            if isinstance(getattr(place.module, leaf, None), nn.Parameter)
        ]
        return need(Match(trained=trained), self, backbone)
