"""mmengine's Runner with exact state, made from a resolved config.

How its parts are built is in `core.engine.runner_building`, how the model is placed on devices in
`core.engine.runner_placement`, what is saved and put back in `core.engine.state.runner`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.logging import MMLogger
from torch import nn

from core.checkpoint import CheckpointStore
from core.config.command.messages import log_warnings, unlogged
from core.config.key import config_key
from core.data.loading.seeds import preserved_random_state
from core.engine.compute import compute
from core.engine.hooks.checkpoint import CheckpointHook
from core.engine.hooks.media import MediaHook
from core.engine.keys.hooks import build_hooks, hook_configs
from core.engine.runner_building import Building, build_test, eval_loop, test_evaluator
from core.engine.runner_placement import Placement, pick_device
from core.engine.state.hooks import HookMemory
from core.engine.state.initial_weights import Beginning
from core.engine.state.runner import FORMAT, RunState, versions

__all__ = ["FORMAT", "Runner", "build_test", "pick_device", "versions"]

_RUNS = itertools.count()


class Runner(Building, Placement, RunState):
    """Builds everything from the resolved config and owns the run's state.

    Args:
        cfg: the resolved config as plain containers (see configs/train.yaml); `run_dir` is set.
        test: what `build_test` has built of it.
    """

    def __init__(self, cfg: dict[str, Any], test: dict[str, Any] | None = None) -> None:
        runtime = cfg["runtime"]
        self.device = pick_device(runtime["device"])
        self.sharded = False
        self.runtime = runtime
        self.settings = cfg
        self._random_state: dict[str, Any] | None = None
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self._resumed_from: Path | None = None
        self._begun = False
        self._saved: tuple[int, Path] | None = None  # step and file of the newest checkpoint
        self.computed: dict[str, Any] = {}  # figures of what a stage computes in place of training
        self.evaluated_step: int | None = None  # of the weights in the final evaluation; None: the last step
        self._beginning: Beginning | None = None
        with config_key("checkpoint"):
            checkpoint = CheckpointHook(**cfg["checkpoint"])
            self.store = CheckpointStore(
                Path(cfg["run_dir"]) / "checkpoints",
                keep_last=checkpoint.keep_last,
                keep_best=checkpoint.keep_best,
                metric=checkpoint.metric,
                direction=checkpoint.direction,
            )
        test = test or {"test_dataloader": cfg["test_dataloader"], "test_evaluator": test_evaluator(cfg)}
        hooks = hook_configs(cfg["custom_hooks"])
        if cfg["ema"] is not None:
            hooks["ema"] = {"type": "core.EMAHook", **cfg["ema"]}
        super().__init__(
            model=cfg["model"],
            work_dir=str(cfg["run_dir"]),
            train_dataloader=cfg["train_dataloader"],
            val_dataloader=cfg["val_dataloader"],
            test_dataloader=test["test_dataloader"],
            train_cfg=cfg["train_cfg"],
            val_cfg=eval_loop(cfg, "val"),
            test_cfg=eval_loop(cfg, "test"),
            optim_wrapper=cfg["optim_wrapper"],
            param_scheduler=cfg["param_scheduler"],
            val_evaluator=cfg["val_evaluator"] if cfg["val_dataloader"] is not None else None,
            test_evaluator=test["test_evaluator"],
            default_hooks={
                "runtime_info": None,
                "timer": None,
                "sampler_seed": None,
                "logger": {"type": "core.LoggingHook", "interval": cfg["log_every"]},
                "param_scheduler": {"type": "ParamSchedulerHook"},
                "checkpoint": checkpoint,
            },
            custom_hooks=hooks,
            launcher="pytorch" if dist.is_initialized() else "none",
            env_cfg={"cudnn_benchmark": runtime["cudnn_benchmark"]},
            visualizer=cfg["visualizer"],
            randomness={"seed": cfg["seed"], "deterministic": runtime["deterministic"]},
            experiment_name=f"{cfg['name']}_{next(_RUNS)}",  # mmengine keeps one logger per name for the whole process
            cfg={"compile": False, "experiment": cfg},
        )
        self.memory = HookMemory(self)

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Plain log file ``run.log`` in the run's folder, besides the console; a resumed run appends to it."""
        self._remove_empty(self._log_dir)
        self._log_dir = self._work_dir
        log_warnings(self._work_dir, self.rank)
        logger = super().build_logger(log_level, log_file or os.path.join(self._work_dir, "run.log"), **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = functools.partial(unlogged, handler)
        return logger

    @staticmethod
    def _remove_empty(folder: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(folder)

    def register_custom_hooks(self, hooks: dict[str, dict[str, Any]]) -> None:
        """Builds the hooks, by their places in the config, now that there is the visualizer that mmdet's ask for."""
        built = build_hooks(hooks)
        media = self.settings["media"]
        if media is not None and not any(isinstance(hook, MediaHook) for hook in built):
            built.append(MediaHook(**media))
        super().register_custom_hooks(built)

    def train(self) -> nn.Module:
        """As mmengine's, with the test loop built first: a wrong setting of it ends the run before anything is trained.

        Training draws the same random numbers as without one.
        """
        with preserved_random_state():
            _ = self.test_loop
        return super().train()

    def compute(self) -> None:
        """What the config's `compute` names, with the model's weights (`core.engine.compute`)."""
        self.computed = compute(self)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """As mmengine's, but a run begins once: hooks that then copy the weights would do so again before the test."""
        if fn_name == "before_run":
            if self._begun:
                return
            self._begun = True
        super().call_hook(fn_name, **kwargs)
        if fn_name == "before_train":
            self.memory.begun()

    def _init_model_weights(self) -> None:
        """Nothing: `build_model` has done it, alike on every process, and DDP sees to it."""

    # ------------------------------------------------------------------ quiet
    def _log_env(self, env_cfg: dict) -> None:
        self.logger.info(f"{self.settings['name']}: seed {self.seed}, {self.device}, {versions()}")

    def get_hooks_info(self) -> str:
        """The hooks in order, on one line."""
        return " ".join(type(h).__name__ for h in self._hooks)

    def dump_config(self) -> None:
        """Nothing: the launcher writes config.yaml before anything is built."""

    def _maybe_compile(self, target: str) -> None:
        """Nothing: networks are compiled in place when they are placed."""


logging.getLogger("mmengine").setLevel(logging.WARNING)
