"""Losses over growing learning rates, and the rate that they suggest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SMOOTHING = 0.95  # share of the past in the smoothed loss
DIVERGED = 4.0  # times the lowest smoothed loss
FIRST = 10  # updates before which neither slope nor divergence is looked at: the smoothed loss has no past yet


@dataclass
class LossCurve:
    """What a sweep found.

    rates: of every update.
    losses: its loss, the mean over micro-steps and processes.
    smoothed: running means of these, without the bias towards the beginning.
    suggestion: the rate at which `smoothed` falls steepest; None: it never falls.
    lowest: the rate at which `smoothed` is lowest.
    diverged: the rate at which the sweep was ended before its end, or None.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None = None
    lowest: float | None = None
    diverged: float | None = None


def judge(rates: Sequence[float], losses: Sequence[float], diverged: float | None = None) -> LossCurve:
    """The smoothed losses of a sweep, and what they suggest."""
    smoothed, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**count))
    found = LossCurve(list(rates), list(losses), smoothed, diverged=diverged)
    if len(smoothed) < FIRST + 3:
        return found
    lowest = min(range(FIRST, len(smoothed)), key=smoothed.__getitem__)
    found.lowest = rates[lowest]
    # Behind the lowest point the loss falls only where it recovers from a jump.
    span = max(1, len(smoothed) // 20)
    slopes = {
        i: (smoothed[i + span] - smoothed[i - span]) / math.log(rates[i + span] / rates[i - span])
        for i in range(max(FIRST, span), lowest - span + 1)
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    if steepest is not None and slopes[steepest] < 0:
        found.suggestion = rates[steepest]
    return found
