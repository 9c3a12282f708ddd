"""The figure that a sweeper optimises: the config's `objective`, read from a run's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from core.engine.keys import eval_sets
from core.errors import ConfigError, nearest


def objective(cfg: Mapping[str, Any], result: Mapping[str, Any]) -> float | list[float] | None:
    """What the config's key `objective` names, for a sweeper.

    Args:
        cfg: the resolved config.
        result: the content of ``result.json``: its `metrics` are looked up first, ``val/NAME`` among `val_metrics`.

    Returns:
        The figure, its negative for ``-NAME``, a list for a list of names; None where the config names none.

    Raises:
        ConfigError: the run has no such metric.
    """
    chosen = cfg["objective"]
    if chosen is None:
        return None
    figures = {**{f"val/{name}": value for name, value in result["val_metrics"].items()}, **result["metrics"]}
    known = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    values = [_signed(name, known) for name in _names(chosen)]
    return values if isinstance(chosen, list) else values[0]


def _signed(name: str, known: Mapping[str, float]) -> float:
    metric = name.removeprefix("-")
    if metric not in known:
        raise ConfigError(
            f"objective: the run has no metric '{metric}'{nearest(metric, known)} (there are: {', '.join(known)})"
        )
    return -known[metric] if name.startswith("-") else known[metric]


def _names(chosen: Any) -> list[str]:
    names = chosen if isinstance(chosen, list) else [chosen]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"objective={chosen!r}: the name of a metric (top1, val/top1), -NAME for its negative, or a list of these"
        )
    return names


def check_objective(cfg: Mapping[str, Any]) -> None:
    """Refuses before anything is trained what no run of this config can report.

    Which metrics an evaluator reports shows in its config for `core.metrics.TorchMetrics` alone; of others the names
    are known when they have evaluated.

    Raises:
        ConfigError: `objective` is not a name or a list of names, nothing is evaluated, or no metric has that name.
    """
    if cfg["objective"] is None:
        return
    val = _of_split(cfg, "val", "val_evaluator")
    tested = _of_split(cfg, "test", "test_evaluator" if cfg["test_evaluator"] else "val_evaluator")
    tested = tested if cfg["test_dataloader"] else val
    for name in _names(cfg["objective"]):
        metric = name.removeprefix("-")
        if not (cfg["val_dataloader"] or cfg["test_dataloader"]):
            raise ConfigError(f"objective={name}: nothing is evaluated, there is neither val_ nor test_dataloader")
        if tested is None or (metric.startswith("val/") and val is None):
            continue
        known = {*tested, *(f"val/{inner}" for inner in val or ())}
        if not any(metric == one or metric.startswith(f"{one}/") for one in known):
            names = ", ".join(sorted(known))
            raise ConfigError(f"objective: no metric is called '{metric}'{nearest(metric, known)} (there are: {names})")


def check_ranking(cfg: Mapping[str, Any], ranked: Iterable[str]) -> None:
    """Refuses a ``checkpoint.metric`` that no validation of this config can report, as far as its config tells.

    Raises:
        ConfigError: no metric has that name.
    """
    known = _of_split(cfg, "val", "val_evaluator") if cfg["val_dataloader"] else None
    for metric in ranked if known else ():
        if not any(metric == one or metric.startswith(f"{one}/") for one in known):
            names = ", ".join(sorted(known))
            raise ConfigError(f"checkpoint.metric: '{metric}' is none of {names}{nearest(metric, known)}")


def _of_split(cfg: Mapping[str, Any], split: str, judge: str) -> set[str] | None:
    """What `_reported` gives of a split, with the names of its sets where it has several."""
    found: set[str] = set()
    names = list(eval_sets.loaders(cfg[f"{split}_dataloader"], f"{split}_dataloader"))
    for name, evaluator in eval_sets.evaluators(cfg[judge], names, judge).items():
        if (reported := _reported(evaluator)) is None:
            return None
        found |= {f"{name}/{figure}" if name else figure for figure in reported}
    return found


def _reported(evaluator: Any) -> set[str] | None:
    """Names that an evaluator's figures begin with; None where its config does not tell."""
    found: set[str] = set()
    for one in evaluator if isinstance(evaluator, list) else [evaluator]:
        if not isinstance(one, Mapping) or one.get("type") not in ("core.metrics.TorchMetrics", "vitrine.TorchMetrics"):
            return None
        prefix = f"{one['prefix']}/" if one.get("prefix") else ""
        if isinstance(metrics := one.get("metrics"), Mapping):
            found.update(prefix + name for name, metric in metrics.items() if metric is not None)
    return found
