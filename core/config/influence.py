"""Keys of a config that change no figure, whatever they say: two runs that differ in nothing else are the same run."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import yaml

from core.config.composition import CONFIGS

# Hooks that only watch, by the last part of their type. Others say so in an attribute, `changes_training = False`.
OBSERVERS = frozenset(
    {
        "MediaHook",
        "LoggingHook",
        "LoggerHook",
        "RuntimeInfoHook",
        "IterTimerHook",
        "ProfilerHook",
        "NPUProfilerHook",
        "EmptyCacheHook",
        "NaiveVisualizationHook",
        "DetVisualizationHook",
        "TrackVisualizationHook",
        "GroundingVisualizationHook",
        "MemoryProfilerHook",
    }
)
# Root keys that have always been part of what a run is. One that is not listed counts where it differs from its default
# in configs/train.yaml, so that a new key does not make every run before it another one.
_ALWAYS = frozenset(
    [
        "name",
        "seed",
        "evaluate",
        "select_on_test",
        "stages",
        "model",
        "train_dataloader",
        "val_dataloader",
        "test_dataloader",
        "train_cfg",
        "val_cfg",
        "test_cfg",
        "optim_wrapper",
        "param_scheduler",
        "val_evaluator",
        "test_evaluator",
        "ema",
        "checkpoint",
        "custom_hooks",
        "load_from",
        "runtime",
    ]
)
# Of a mapping under the key `cache`: where and how fast things are kept.
_CACHE = ("folder", "batch_size", "per_tokenizer")
# Root keys that say how a run is watched.
WATCHING = ("vars", "media", "log_every", "visualizer", "objective")
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_LOADER = ("timeout", "multiprocessing_context")
_JUDGES = ("metric", "direction")
_FREQUENCY = ("val_every_epochs", "val_every_steps", "val_begin")


def without_defaults(kept: Mapping[str, Any]) -> dict[str, Any]:
    """A config's root keys without later ones that are at their defaults."""
    defaults = _defaults()
    return {key: value for key, value in kept.items() if key in _ALWAYS or not _at_default(value, defaults.get(key))}


def _at_default(value: Any, default: Any) -> bool:
    return value == default or (not value and not default)


@functools.cache
def _defaults() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "train.yaml").read_text())


def without_declared(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that it names itself under ``without_influence``, and without that list."""
    kept = {key: value for key, value in cfg.items() if key != "without_influence"}
    for key in cfg.get("without_influence") or ():
        kept = _without(kept, str(key).split("."))
    return kept


def _without(node: Any, path: list[str]) -> Any:
    if isinstance(node, list) and path[0].isdecimal():  # of a stage
        return [_without(item, path[1:]) if i == int(path[0]) and path[1:] else item for i, item in enumerate(node)]
    if not isinstance(node, Mapping) or path[0] not in node:
        return node
    if len(path) == 1:
        return {key: value for key, value in node.items() if key != path[0]}
    return {**node, path[0]: _without(node[path[0]], path[1:])}


def influential(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config, reduced by `core.config.fingerprint`, that changes figures; runs of equal figures share it.

    Hooks that only watch are left out, and places and speed of caches. How often and by what metric checkpoints are
    judged counts where something depends on it.
    """
    kept = _watched(kept)
    if isinstance(kept.get("stages"), list):
        kept["stages"] = [_watched(stage) if isinstance(stage, Mapping) else stage for stage in kept["stages"]]
    if "select_on_test" in kept:
        kept["select_on_test"] = False  # permits a selection, which `evaluate` asks for
    stages = [stage for stage in kept.get("stages") or () if isinstance(stage, dict)]
    judged = any(judged_while_training(part) for part in (kept, *stages))
    if "checkpoint" in kept and not judged:
        kept["checkpoint"] = {"metric": None, "direction": "higher"}
    for stage in stages:
        if isinstance(stage.get("checkpoint"), Mapping):
            stage["checkpoint"] = {k: v for k, v in stage["checkpoint"].items() if judged and k in _JUDGES}
        if not stage.get("checkpoint"):
            stage.pop("checkpoint", None)
    for part in (kept, *stages):
        if isinstance(part.get("train_cfg"), Mapping) and not judged:
            part["train_cfg"] = {key: value for key, value in part["train_cfg"].items() if key not in _FREQUENCY}
    return kept


def judged_while_training(part: Mapping[str, Any]) -> bool:
    """Whether evaluations during training reach the figures: by selection, a schedule, or a hook that reads them."""
    return (
        part.get("evaluate", "last") != "last"
        or bool(part.get("custom_hooks"))
        or "Plateau" in repr(part.get("param_scheduler"))
        or _picks_best(part.get("load_from"))
    )


def _picks_best(load_from: Any) -> bool:
    sources = load_from if isinstance(load_from, list) else [load_from]
    return any(isinstance(source, Mapping) and source.get("best") for source in sources)


def _watched(part: Mapping[str, Any]) -> dict[str, Any]:
    """Root keys of a config, or of one of its stages, without what only watches."""
    part = {key: _caches(value) for key, value in part.items() if key not in WATCHING}
    hooks = part.get("custom_hooks")
    if hooks is not None:
        listed = [h for h in hooks.values() if h is not None] if isinstance(hooks, Mapping) else hooks
        part["custom_hooks"] = [hook for hook in listed if not only_watches(hook)]
    for key in _LOADERS:
        if isinstance(part.get(key), Mapping):
            part[key] = {name: value for name, value in part[key].items() if name not in _LOADER}
    return part


def _caches(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _cache(value) if key == "cache" else _caches(value) for key, value in node.items()}
    return [_caches(value) for value in node] if isinstance(node, list) else node


def _cache(value: Any) -> Any:
    if isinstance(value, str):
        return None  # a folder alone
    if isinstance(value, Mapping):
        return {key: _caches(inner) for key, inner in value.items() if key not in _CACHE}
    return value


def only_watches(hook: Any) -> bool:
    """Whether a hook's config is that of one which neither changes training nor figures."""
    kind = hook.get("type") if isinstance(hook, Mapping) else None
    if not isinstance(kind, str):
        return False
    package, _, name = kind.rpartition(".")
    if name in OBSERVERS and package.partition(".")[0] in ("", "core", "vitrine", "mmengine", "mmdet"):
        return True
    if not package:
        return False
    try:
        return getattr(_imported(kind), "changes_training", True) is False
    except Exception:  # what cannot be imported may do anything
        return False


def _imported(path: str) -> Any:
    package, *parts = path.split(".")
    target: Any = importlib.import_module(package)
    for depth, part in enumerate(parts):
        if not hasattr(target, part):
            importlib.import_module(".".join([package, *parts[: depth + 1]]))
        target = getattr(target, part)
    return target
