"""What an evaluator's config means, wherever one is built: a metric, a list of metrics, or an mmengine evaluator."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.evaluator import Evaluator

from core.config.registry import build, resolve
from core.errors import ConfigError


def build_evaluator(evaluator: Any) -> Evaluator:
    """The evaluator of a loop.

    Args:
        evaluator: a metric's config (``{type: core.metrics.TorchMetrics, metrics: ...}``), a list of such, an mmengine
            evaluator's config (``{metrics: [...]}``, with or without ``type``), or any of these as built objects.

    Raises:
        ConfigError: it is empty, or something in it is neither a metric nor an evaluator.
    """
    if isinstance(evaluator, Evaluator):
        return evaluator
    if isinstance(evaluator, Mapping) and "type" not in evaluator and "metrics" in evaluator:
        evaluator = {"type": Evaluator, **evaluator}
    if isinstance(evaluator, Mapping) and "type" in evaluator:
        target = resolve(evaluator["type"])
        if inspect.isclass(target) and issubclass(target, Evaluator):
            several = evaluator.get("metrics")
            own = [_own(one) for one in several] if isinstance(several, list | tuple) else _own(several)
            return build({**evaluator, "metrics": own} if several else dict(evaluator))
    metrics = list(evaluator) if isinstance(evaluator, list | tuple) else [evaluator]
    if not metrics:
        raise ConfigError("an evaluator needs a metric, as in {type: core.metrics.TorchMetrics, metrics: ...}")
    return Evaluator([_metric(one) for one in metrics])


def _own(one: Any) -> Any:
    """A metric's config; mmdet's for COCO is replaced by the one that reads annotation files as they are."""
    if isinstance(one, Mapping) and one.get("type") == "mmdet.CocoMetric":
        return {**one, "type": "core.data.coco.CocoFigures"}
    return one


def _metric(one: Any) -> Any:
    built = build(_own(one))
    if not all(callable(getattr(built, name, None)) for name in ("process", "evaluate")):
        raise ConfigError(
            "an evaluator takes metrics, which are objects with process(data_batch, data_samples) and evaluate(size), "
            f"not {one!r}"
        )
    return built
