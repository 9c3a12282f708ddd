"""Equal cost: choose how much a method keeps so that a forward pass has a given number of multiply-accumulates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def count_macs(model: nn.Module, size: tuple[int, int], in_chans: int = 3) -> int:
    """Multiply-accumulates of one image of `size` = `(height, width)` in evaluation.

    Counted on a copy on the meta device: no memory, no arithmetic.
    """
    return _count(on_meta(model), size, in_chans)


def match_macs(
    model: nn.Module,
    macs: float,
    size: tuple[int, int],
    *,
    rates: Sequence[T],
    set_rate: Callable[[nn.Module, T], None],
    in_chans: int = 3,
    tolerance: float = 0.01,
) -> T:
    """Find the rate at which `model` costs `macs`, and set it.

    Args:
        model: changed by `set_rate` alone.
        macs: multiply-accumulates of one image.
        size: its `(height, width)`.
        rates: candidates in order of rising cost.
        set_rate: `(model, rate)` applies a candidate to a model, without changing its weights.
        in_chans: channels of the image.
        tolerance: largest relative deviation.

    Returns:
        The rate: the first found within a quarter of the tolerance, or else that of the nearest cost.

    Raises:
        ValueError: no rate comes near enough; says what can be reached.
    """
    probe = on_meta(model)
    costs: dict[int, int] = {}

    def cost(index: int) -> int:
        if index not in costs:
            set_rate(probe, rates[index])
            costs[index] = _count(probe, size, in_chans)
        return costs[index]

    best = _nearest(lambda index: cost(index) / macs - 1, len(rates) - 1, enough=tolerance / 4)
    if abs(cost(best) - macs) > tolerance * macs:
        least, most = cost(0), cost(len(rates) - 1)
        raise ValueError(
            f"macs={macs:.4g} cannot be matched within {100 * tolerance:g} %: the nearest is {cost(best):.4g}, "
            f"this method reaches {least:.4g} to {most:.4g}"
        )
    set_rate(model, rates[best])
    return rates[best]


def _nearest(excess: Callable[[int], float], last: int, enough: float) -> int:
    """Where in 0..last the rising function `excess` is nearest to 0, or near `enough`; few evaluations (Illinois)."""
    low, high = 0, last
    below, above = excess(low), excess(high)
    if below >= 0 or above <= 0:
        return low if below >= 0 else high
    kept = 0
    while high - low > 1:
        middle = min(max(low + round((high - low) * below / (below - above)), low + 1), high - 1)
        value = excess(middle)
        if abs(value) <= enough:
            return middle
        # An end that stays twice counts for half, so that the other one moves too.
        if value < 0:
            low, below, above, kept = middle, value, above / 2 if kept > 0 else above, 1
        else:
            high, above, below, kept = middle, value, below / 2 if kept < 0 else below, -1
    return min((low, high), key=lambda index: abs(excess(index)))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy on the meta device, without memory, in evaluation mode."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


def _count(model: nn.Module, size: tuple[int, int], in_chans: int) -> int:
    # The composite form of attention is two matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, in_chans, *size, device="meta"))
    return counter.get_total_flops() // 2
