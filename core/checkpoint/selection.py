"""By which figures checkpoints are selected, and which way each is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from core.errors import ConfigError

Direction = Literal["higher", "lower"]
Metric = str | Sequence[str] | Mapping[str, Direction] | None


def ranking(metric: Metric, direction: Any = "higher") -> dict[str, Direction]:
    """Which way every metric of a config's ``checkpoint.metric`` is better; the first one is what "best" means.

    Args:
        metric: a name, a list of names, a mapping of names to "higher" or "lower", or None.
        direction: of names that come without one.

    Raises:
        ConfigError: an unknown direction, or something that is not the name of a metric.
    """
    if isinstance(metric, Mapping):
        ways = dict(metric)
    elif isinstance(metric, list | tuple):
        ways = {name if isinstance(name, str) else repr(name): direction for name in metric}
        if len(ways) != len(metric) or not all(isinstance(name, str) for name in metric):
            raise ConfigError(f"checkpoint.metric={metric!r}: a list of different names of metrics")
    else:
        ways = {} if metric is None else {metric: direction}
    for name, way in {"": direction, **ways}.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"checkpoint.metric={metric!r}: a metric's name, a list of names, or NAME: higher | lower"
            )
        if way not in ("higher", "lower"):
            where = f"checkpoint.metric.{name}" if isinstance(metric, Mapping) and name else "checkpoint.direction"
            raise ConfigError(f"{where}={way!r}: a better metric is 'higher' or 'lower'")
    return ways
