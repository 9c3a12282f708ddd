"""Metrics of a checkpoint without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from core.checkpoint.run_folder import choose_run_dir, find_checkpoint
from core.config.command.processes import managers_unlocked
from core.engine.keys.check import checked
from core.engine.launch import make_runner, process_set_up
from core.engine.run.config import stage_for
from core.errors import ConfigError


def evaluate(
    cfg: DictConfig | dict[str, Any],
    checkpoint: str | Path | None,
    split: str = "test",
    load: Mapping[str, Any] | None = None,
    stage: str | None = None,
) -> dict[str, Any]:
    """Metrics of a checkpoint on the test split (or the validation split where there is no test split).

    Args:
        cfg: the experiment; of one with stages, the stage is evaluated to which the checkpoint belongs.
        checkpoint: a run's folder or checkpoint, or a weights file; None: the weights as built. What a file of a part
            of the model lacks is loaded as the config's `load_from` says.
        split: "test" or "val".
        load: what of the file goes where: fields of `core.checkpoint.weights.Source`.
        stage: of an experiment with stages, the name of the one that is meant.

    Raises:
        ConfigError: no such split or file, or weights that hold NaN or infinity.
        core.checkpoint.StateMismatch: the weights do not fit the model.
    """
    if split not in ("test", "val"):
        raise ConfigError(f"split={split}: test or val")
    file = None if checkpoint is None else find_checkpoint(checkpoint)
    plain = checked(stage_for(cfg, file, stage))
    with process_set_up(plain["runtime"]):
        return _evaluated(plain, file, split, load)


def _evaluated(plain: dict[str, Any], file: Path | None, split: str, load: Mapping[str, Any] | None) -> dict[str, Any]:
    if plain["test_dataloader"] is None:
        split = "val"
    if plain.get(f"{split}_dataloader") is None:
        raise ConfigError(f"{plain['name']} has no {split}_dataloader")
    plain["train_dataloader"] = plain["train_cfg"] = plain["optim_wrapper"] = plain["param_scheduler"] = None
    plain["ema"] = None
    if file is not None:
        plain["load_from"] = {**(load or {}), "path": str(file), "rest": plain["load_from"]}
    plain["runs_dir"] = str(Path(plain["runs_dir"]) / "evaluations")  # apart from the runs that were trained
    plain["run_dir"] = str(choose_run_dir(plain))
    with managers_unlocked():
        runner = make_runner(plain)
        try:
            return runner.test() if split == "test" else runner.val()
        finally:
            runner.visualizer.close()
