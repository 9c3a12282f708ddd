"""Metrics of a checkpoint without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from core.config import to_dict
from core.config_check import checked
from core.errors import ConfigError
from core.launch import make_runner, set_up_process
from core.run_folder import choose_run_dir, find_checkpoint


def evaluate(cfg: DictConfig | dict[str, Any], checkpoint: str | Path | None, split: str = "test") -> dict[str, Any]:
    """Metrics of a checkpoint on the test split (or the validation split where there is no test split).

    Args:
        cfg: the experiment.
        checkpoint: a run's folder or checkpoint, or a weights file; None: the weights as built.
        split: "test" or "val".

    Raises:
        ConfigError: no such split or file.
    """
    plain = checked(to_dict(cfg))
    set_up_process(plain["runtime"])
    if plain["test_dataloader"] is None:
        split = "val"
    if plain[f"{split}_dataloader"] is None:
        raise ConfigError(f"{plain['name']} has no {split}_dataloader")
    plain["train_dataloader"] = plain["train_cfg"] = plain["optim_wrapper"] = plain["param_scheduler"] = None
    plain["ema"] = None
    if checkpoint is not None:
        plain["load_from"] = {"path": str(find_checkpoint(checkpoint))}
    plain["runs_dir"] = str(Path(plain["runs_dir"]) / "evaluations")  # apart from the runs that were trained
    plain["run_dir"] = str(choose_run_dir(plain))
    runner = make_runner(plain)
    return runner.test() if split == "test" else runner.val()
