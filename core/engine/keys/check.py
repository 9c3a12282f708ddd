"""A resolved config that can be meant: its keys, types and arguments exist, before anything is built."""

from __future__ import annotations

import os
import sys
from typing import Any

import yaml

from core.checkpoint.selection import ranking
from core.config.composition import CONFIGS, displaced, experiments, merge
from core.config.key import config_key
from core.engine.keys import eval_sets
from core.engine.keys.hooks import hook_configs
from core.engine.keys.kinds import check_kinds, check_loader, check_together
from core.engine.keys.objective import check_objective, check_ranking
from core.errors import ConfigError, close_names

_WRITTEN = ("resume_from", "stage_of", "forked_from", "resume_history")  # what a run adds to its config.yaml
_TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "ema")
_EVALUATION = ("val_dataloader", "test_dataloader", "val_cfg", "test_cfg", "val_evaluator", "test_evaluator")
_NOT_BUILT = ("stages", "components", "vars")  # keys in which a `type` names nothing that is built


def checked(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config, if it can be meant: its keys, types and arguments exist."""
    look_in_working_directory()
    cfg = {**_root_defaults(), **cfg}
    if not cfg.get("model"):
        raise ConfigError(f"there is no model: choose an experiment, experiment=... ({some_experiments()})")
    if not cfg["name"]:
        raise ConfigError("there is no name: the experiment sets its id, e.g. name: stvit/digits")
    _check_names(cfg)
    _check_one(cfg)
    _check_components(cfg)
    _check_variables(cfg)
    staged = [stage_config(cfg, stage) for stage in cfg["stages"]]
    for index, (stage, whole) in enumerate(zip(cfg["stages"], staged, strict=True)):
        with config_key(f"stages.{index}"):
            _check_names(stage)
            _check_one(whole)
    for index, whole in enumerate(staged or [cfg]):
        with config_key(f"stages.{index}" if staged else ""):
            check_together(whole)
            check_ranking(whole, ranking(whole["checkpoint"]["metric"], whole["checkpoint"]["direction"]))
    check_objective((staged or [cfg])[-1])
    cfg["paper"] = cfg["paper"] or cfg["name"].partition("/")[0]
    return cfg


def _check_one(cfg: dict[str, Any]) -> None:
    from core.config.registry import check

    check_kinds(cfg)
    hook_configs(cfg["custom_hooks"])
    _check_sets(cfg)
    _check_selection(cfg)
    check({k: v for k, v in cfg.items() if k not in (*_NOT_BUILT, "compute")})
    _check_compute(cfg["compute"])


def _check_compute(job: Any) -> None:
    """What a stage computes: its dataloader is not an argument of it."""
    from core.config.registry import check

    if job is None:
        return
    if not isinstance(job, dict) or not isinstance(job.get("type"), str):
        raise ConfigError("compute: what is computed, {type: ..., dataloader: {batch_size: ..., dataset: ...}}")
    loading = job.get("dataloader")
    if not isinstance(loading, dict) or not loading.get("dataset"):
        raise ConfigError("compute.dataloader: the data that it reads, {batch_size: ..., dataset: ...}")
    check_loader(loading, "compute.dataloader")
    check(loading, "compute.dataloader")
    check({k: v for k, v in job.items() if k != "dataloader"}, "compute")


def stage_config(cfg: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """The config of one stage: the experiment's, with the stage's keys laid over it."""
    staged = merge({**cfg, "stages": []}, {k: v for k, v in stage.items() if k != "name"})
    if isinstance(staged["train_cfg"], dict):
        asked = [key for key, value in (stage.get("train_cfg") or {}).items() if value is not None]
        staged["train_cfg"] = {**staged["train_cfg"], **dict.fromkeys(displaced(staged["train_cfg"], asked))}
    if stage.get("compute") is not None:  # in place of training and evaluation, whatever the experiment says of these
        staged |= dict.fromkeys(key for key in (*_TRAINING, *_EVALUATION) if key in staged)
    return staged


def _root_defaults() -> dict[str, Any]:
    """The keys of configs/train.yaml, which a config may lack: an override removed one, or an older run has none."""
    root = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    return {key: value for key, value in root.items() if key not in ("defaults", "hydra")}


def _check_names(cfg: dict[str, Any]) -> None:
    known = {*_root_defaults(), "runtime", "visualizer", "log_every", *_WRITTEN}
    for key in cfg:
        if key not in known:
            near = close_names(key, known, cutoff=0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"there is no key '{key}' here{hint}")


def _check_components(cfg: dict[str, Any]) -> None:
    for name, component in cfg["components"].items():
        wrong = set(component) ^ {"key", "default", "alternatives"}
        if wrong:
            raise ConfigError(f"components.{name} has to give key, default and alternatives (see {sorted(wrong)})")


def _check_variables(cfg: dict[str, Any]) -> None:
    if not isinstance(cfg["vars"], dict):
        raise ConfigError(f"vars={cfg['vars']!r}: vars is a mapping of names to values, e.g. +vars.width=64")
    for index, stage in enumerate(cfg["stages"]):
        if "vars" in stage:
            raise ConfigError(
                f"stages.{index}.vars has no effect, since ${{vars...}} is resolved before there are stages: "
                "set the variable at the top of the config, under a name of its own for every stage"
            )


def _datasets(cfg: dict[str, Any], split: str) -> list[Any]:
    where = f"{split}_dataloader"
    return [loader.get("dataset") for loader in eval_sets.loaders(cfg[where], where).values()]


def _check_sets(cfg: dict[str, Any]) -> None:
    """Several evaluation sets: every one as it will be, with what is shared."""
    from core.config.registry import check

    for split in ("val", "test"):
        where = f"{split}_dataloader"
        loaders = eval_sets.loaders(cfg[where], where)
        judge = f"{split}_evaluator" if cfg[f"{split}_evaluator"] is not None else "val_evaluator"
        if loaders:
            eval_sets.evaluators(cfg[judge], list(loaders), judge)
        for name, loader in loaders.items():
            check_loader(loader, eval_sets.place(where, name))
            if name:
                check(loader, eval_sets.place(where, name))


def _check_selection(cfg: dict[str, Any]) -> None:
    if cfg["evaluate"] not in ("last", "best"):
        raise ConfigError(f"evaluate={cfg['evaluate']}: last or best")
    ranked = ranking(cfg["checkpoint"]["metric"], cfg["checkpoint"]["direction"])
    if cfg["evaluate"] == "best":
        if not ranked:
            raise ConfigError("evaluate=best needs checkpoint.metric")
        val, test = (_datasets(cfg, split) for split in ("val", "test"))
        if any(dataset in test for dataset in val) and not cfg["select_on_test"]:
            raise ConfigError(
                "evaluate=best would select the checkpoint on the test split: give val_dataloader a split of its own, "
                "or say select_on_test=true"
            )


def some_experiments() -> str:
    """A few names of experiments, for messages."""
    return ", ".join(list(experiments())[:6]) + ", ...; tools/train.py --list"


def look_in_working_directory() -> None:
    """A user's own package beside the command is importable, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
