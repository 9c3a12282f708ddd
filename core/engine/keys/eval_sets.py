"""Several evaluation sets in one split: named loaders, an evaluator for all or for each, figures as ``NAME/figure``.

.. code-block:: yaml

    val_dataloader:
      batch_size: 64 # what stands beside `sets` holds for every set that does not say otherwise
      dataset: {type: package.Data, split: val}
      sets:
        clean: {}
        noisy: {dataset: {noise: 0.1}}
    val_evaluator: {type: core.metrics.TorchMetrics, metrics: ...} # for every set; or {sets: {clean: ..., noisy: ...}}
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from core.config.composition import merge
from core.errors import ConfigError

KEY = "sets"


def loaders(loader: Any, where: str) -> dict[str, dict[str, Any]]:
    """The loader configs of a split by name of their sets; a plain loader's under the empty name, nothing for None.

    Args:
        loader: the config of a loader, with or without ``sets``. A set that is None is left out.
        where: its key, for errors.

    Raises:
        ConfigError: ``sets`` is not a mapping of names to loader configs, or leaves no set; the names of sets become
            part of the names of figures, so that they have no slash.
    """
    if loader is None:
        return {}
    if not isinstance(loader, Mapping) or KEY not in loader:
        return {"": loader}
    shared = {key: value for key, value in loader.items() if key != KEY}
    sets = _named(loader[KEY], f"{where}.{KEY}")
    found = {name: merge(shared, own) for name, own in sets.items()}
    for name, one in found.items():
        if not one.get("dataset"):
            raise ConfigError(f"{where}.{KEY}.{name} has no dataset, and neither has {where} beside `{KEY}`")
    return found


def place(where: str, name: str) -> str:
    """The key of a set's loader or evaluator: ``val_dataloader.sets.noisy``, or that of the only one."""
    return f"{where}.{KEY}.{name}" if name else where


def evaluators(evaluator: Any, names: list[str], where: str) -> dict[str, Any]:
    """The evaluator of every set.

    Args:
        evaluator: one for all sets, of which each gets a copy, or ``{sets: {NAME: evaluator}}``.
        names: of the sets; one empty name for a split without sets.
        where: the evaluator's key, for errors.

    Raises:
        ConfigError: evaluators by names that are not those of the sets.
    """
    if not isinstance(evaluator, Mapping) or KEY not in evaluator:
        return {name: copy.deepcopy(evaluator) for name in names}
    if names == [""]:
        raise ConfigError(f"{where}.{KEY} gives evaluators by name, but the split's dataloader has no `{KEY}`")
    if len(evaluator) > 1:
        other = next(key for key in evaluator if key != KEY)
        raise ConfigError(
            f"{where}.{other} stands beside {where}.{KEY}: an evaluator is one for all sets, or each by name"
        )
    own = _named(evaluator[KEY], f"{where}.{KEY}")
    if set(own) != set(names):
        missing, unknown = sorted(set(names) - set(own)), sorted(set(own) - set(names))
        raise ConfigError(f"{where}.{KEY} has to name the sets {names}: missing {missing}, without a set {unknown}")
    return {name: own[name] for name in names}


def _named(sets: Any, where: str) -> dict[str, Any]:
    if not isinstance(sets, Mapping):
        raise ConfigError(f"{where}={sets!r}: a mapping of names to configs, e.g. {{clean: {{...}}, noisy: {{...}}}}")
    kept = {str(name): value for name, value in sets.items() if value is not None}
    if not kept:
        raise ConfigError(f"{where} names no set: give at least one, or leave `{KEY}` away")
    for name, value in kept.items():
        if not name or "/" in name:
            raise ConfigError(
                f"{where}: '{name}' cannot be a set's name, which is put before a figure's: {name}/figure"
            )
        if not isinstance(value, Mapping) and where.endswith(f"dataloader.{KEY}"):
            raise ConfigError(f"{where}.{name}={value!r}: a loader's keys, laid over those beside `{KEY}`")
    return kept
