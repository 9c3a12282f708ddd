"""The kinds of values that the engine's own keys hold; what a ``type`` names says itself what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from core.config.key import config_key, unsuited
from core.config.kinds import Built, Count, Range, Whole, shown, suits
from core.config.shortened import SPLITS, Batches
from core.errors import ConfigError, nearest

_Path = str | None
_Seconds = Annotated[float, Range(0)]
_Stage = Mapping[str, Any]
_Evaluator = Mapping[str, Any] | list[Built] | None

# Of every key at the top that is there. Keys whose rules are more than a kind are checked where they are read.
ROOT: dict[str, Any] = {
    "name": str,
    "paper": str | None,
    "seed": Annotated[int, Range(0, 2**32 - 1)],
    "resume": bool | str | None,
    "runs_dir": str,
    "run_dir": _Path,
    "evaluate": Literal["last", "best"],
    "select_on_test": bool,
    "stages": list[_Stage],
    "components": Mapping[str, Mapping[str, Any]],
    "overrides": list[str],
    "log_every": Count,
    "model": Built,
    "train_dataloader": Mapping[str, Any] | None,
    "val_dataloader": Mapping[str, Any] | None,
    "test_dataloader": Mapping[str, Any] | None,
    "train_cfg": Mapping[str, Any] | None,
    "val_cfg": Mapping[str, Any] | None,
    "test_cfg": Mapping[str, Any] | None,
    "optim_wrapper": Mapping[str, Any] | None,
    "param_scheduler": Mapping[str, Any] | list[Built] | None,
    "val_evaluator": _Evaluator,
    "test_evaluator": _Evaluator,
    "ema": Mapping[str, Any] | None,
    "checkpoint": Mapping[str, Any],
    "load_from": str | Mapping[str, Any] | list[str | Mapping[str, Any]] | None,
    "runtime": Mapping[str, Any],
    "visualizer": Mapping[str, Any] | None,
}

LOADER: dict[str, Any] = {
    "dataset": Built,
    "batch_size": Count,
    "num_workers": Whole,
    "drop_last": bool,
    "on_error": Literal["raise", "skip"],
    "persistent_workers": bool,
    "prefetch_factor": Count | None,
    "pin_memory": bool,
    "timeout": _Seconds,
    "sampler": Mapping[str, Any] | None,
    "batch_sampler": Built | None,
}

RUNTIME: dict[str, Any] = {
    "device": str,
    "precision": Literal["fp32", "bf16", "fp16"],
    "compile": bool | Mapping[str, Any],
    "channels_last": bool,
    "prefetch": bool,
    "threads": Whole | None,
    "deterministic": bool,
    "cudnn_benchmark": bool,
    "fsdp": Mapping[str, Any] | None,
    "find_unused_parameters": bool | None,
    "sync_batchnorm": bool,
    "timeout_s": Annotated[float, Range(1)],
    "debug": bool,
    "sanity_batches": Whole,
    "fast_dev_run": bool | Count | None,
    "limit_batches": Mapping[str, Batches] | None,
    "overfit_batches": Batches,
}

# A loop of another type has other keys, or means the same by these.
_TRAIN = dict.fromkeys(("max_epochs", "max_steps", "val_every_epochs", "val_every_steps", "val_begin"), Whole | None)
_CHECKPOINT = {"keep_last": Count | None, "keep_best": Whole}
_VISUALIZER = {"vis_backends": list[Built] | None}

_SECTIONS = {
    "runtime": RUNTIME,
    "train_cfg": _TRAIN,
    "checkpoint": _CHECKPOINT,
    "visualizer": _VISUALIZER,
}

# Keys that hold the arguments of one class unless they name another with ``type``.
_CLASSES = {
    "train_cfg": "core.TrainLoop",
    "val_cfg": "core.EvalLoop",
    "test_cfg": "core.EvalLoop",
    "checkpoint": "core.CheckpointHook",
    "ema": "core.EMAHook",
    "media": "core.MediaHook",
}


def check_kinds(cfg: Mapping[str, Any]) -> None:
    """Holds the values of the engine's own keys against their kinds.

    Raises:
        ConfigError: the first that is of another kind.
    """
    _check(cfg, ROOT)
    for key, kinds in _SECTIONS.items():
        if isinstance(cfg.get(key), Mapping):
            with config_key(key):
                _check(cfg[key], kinds)
    from core.config.registry import check

    for split in (cfg.get("runtime") or {}).get("limit_batches") or ():
        if split not in SPLITS:
            raise ConfigError(
                f"runtime.limit_batches.{split}: the splits are {', '.join(SPLITS)}{nearest(split, SPLITS)}"
            )

    for key, name in _CLASSES.items():
        if isinstance(cfg.get(key), Mapping):
            check({"type": name, **cfg[key]}, key)
    if cfg.get("train_dataloader") is not None:
        check_loader(cfg["train_dataloader"], "train_dataloader")
    _check_optimizers(cfg.get("optim_wrapper"))
    _check_schedules(cfg.get("param_scheduler"))
    _check_initial_weights(cfg.get("load_from"))


def check_loader(loader: Mapping[str, Any], place: str) -> None:
    """Holds the values of a dataloader's config against their kinds.

    Raises:
        ConfigError: the first that is of another kind.
    """
    from core.config.registry import check

    with config_key(place):
        _check(loader, LOADER)
    if isinstance(sampler := loader.get("sampler"), Mapping):
        name = "core.data.TrainSampler" if place == "train_dataloader" else "core.data.EvalSampler"
        check({"type": name, **sampler}, f"{place}.sampler")


def _check(node: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for key, hint in kinds.items():
        if key in node and not suits(node[key], hint):
            raise unsuited(node[key], hint).within(key)


def _check_optimizers(wrapper: Mapping[str, Any] | None) -> None:
    """One optimizer below ``optimizer``, or several below names, each with an ``optimizer``."""
    from core.config.registry import check

    if wrapper is None or "constructor" in wrapper:
        return
    single = "optimizer" in wrapper
    for name, own in {"": wrapper}.items() if single else wrapper.items():
        if isinstance(own, Mapping) and "optimizer" in own:
            place = f"optim_wrapper.{name}".rstrip(".")
            with config_key(place):
                _check(own, {"optimizer": Built})
            options = {key: value for key, value in own.items() if key not in ("optimizer", "params")}
            check({"type": "core.OptimWrapper", **options}, place)


def _check_schedules(schedule: Any) -> None:
    """A schedule, a list of schedules, or one or several for every optimizer by its name."""
    if isinstance(schedule, Mapping) and "type" not in schedule:
        with config_key("param_scheduler"):
            _check(schedule, dict.fromkeys(schedule, Built | list[Built]))


def _check_initial_weights(load_from: Any) -> None:
    from core.checkpoint.weights import Source
    from core.config.registry import check_arguments, check_values

    several = isinstance(load_from, list | tuple)
    for index, one in enumerate(load_from if several else [load_from]):
        if not isinstance(one, Mapping):
            continue
        with config_key(f"load_from.{index}" if several else "load_from"):
            options = {key: value for key, value in one.items() if key != "stage"}
            check_arguments(Source, options, where="it")
            check_values(Source, options, where="it")
            if (one.get("path") is None) == (one.get("stage") is None):
                raise ConfigError(f"{shown(one)} has to give either a path, or the stage whose weights are meant")


def check_together(cfg: Mapping[str, Any]) -> None:
    """Keys that need each other, in a config that runs as it stands (an experiment's stages complete it).

    Raises:
        ConfigError: data without what is done with it, or the reverse.
    """
    for key in ("train_cfg", "optim_wrapper"):
        if cfg["train_dataloader"] is not None and cfg[key] is None:
            need = "a length, e.g. train_cfg.max_epochs=10" if key == "train_cfg" else "an optimizer"
            raise ConfigError(f"{key}=null: the train_dataloader needs {need} (train_dataloader=null trains nothing)")
    for key in ("train_cfg", "optim_wrapper", "param_scheduler"):
        if cfg["train_dataloader"] is None and cfg[key] is not None:
            raise ConfigError(f"train_dataloader=null: nothing is trained, so set {key}=null as well")
    for split in ("val", "test"):
        judged = cfg["val_evaluator"] is not None or (split == "test" and cfg["test_evaluator"] is not None)
        if cfg[f"{split}_dataloader"] is not None and not judged:
            raise ConfigError(
                f"{split}_evaluator=null: the {split}_dataloader needs one ({split}_dataloader=null evaluates nothing)"
            )
