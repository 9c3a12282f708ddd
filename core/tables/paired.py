"""Statistics of paired differences: the same seeds with and without a change."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A difference counts when it exceeds this many of its standard errors.
ERRORS = 2.0


@dataclass(frozen=True)
class Paired:
    """Differences that share everything but the change, e.g. one per seed.

    The standard error is that of their mean, from the sample standard deviation (n - 1). One difference has none.
    """

    differences: tuple[float, ...]

    @classmethod
    def of(cls, changed: Mapping[Any, float], base: Mapping[Any, float]) -> Paired:
        """``changed - base`` for the keys (seeds) that both have, in the order of `changed`."""
        return cls(tuple(float(changed[key]) - float(base[key]) for key in changed if key in base))

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return len(self.differences)

    @property
    def mean(self) -> float | None:
        """Mean difference; None without pairs."""
        return statistics.fmean(self.differences) if self.differences else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None with fewer than two pairs."""
        if self.count < 2:
            return None
        return statistics.stdev(self.differences) / math.sqrt(self.count)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Mean minus and plus `ERRORS` standard errors; None with fewer than two pairs."""
        if self.error is None or self.mean is None:
            return None
        return self.mean - ERRORS * self.error, self.mean + ERRORS * self.error

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % confidence interval of the mean (n - 1 degrees of freedom), honest for few seeds."""
        if self.error is None or self.mean is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, self.count - 1)) * self.error
        return self.mean - half, self.mean + half

    @property
    def clear(self) -> bool:
        """Whether the difference exceeds `ERRORS` standard errors, in either direction."""
        return self.bounds is not None and not self.bounds[0] <= 0.0 <= self.bounds[1]


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
