"""mmengine's Runner with exact state: what is saved, how it is put back, and how a trainer is placed on devices."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapperDict
from mmengine.registry import PARAM_SCHEDULERS, VISUALIZERS
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as MMRunner
from mmengine.structures import BaseDataElement
from torch import nn

from core import eval_sets
from core.buffers import place_batch_norms, reconcile, reconcile_module
from core.checkpoint import CheckpointStore, CheckpointWriteError, load, load_state, save_atomic
from core.config_key import config_key
from core.data.loader import build_loader
from core.data.seeds import preserved_random_state, seed_sample
from core.detection import keep_boxes_exact, networks
from core.ema import EMA
from core.errors import ConfigError
from core.evaluators import build_evaluator
from core.hook_configs import build_hooks, hook_configs
from core.hooks.checkpoint import CheckpointHook
from core.hooks.media import MediaHook
from core.initial_weights import Beginning, derives_data
from core.kinds import shown
from core.messages import log_warnings
from core.optim import autocast
from core.parallel import full_model_state, load_full_model_state, shard
from core.randomness import random_state, set_random_state
from core.regime import regime, restore_regime, scheduler_states
from core.registry import DATASETS, LOOPS, build, nearest
from core.sharding import local
from core.trainer import DataParallelTrainer, Trainer, unwrap

FORMAT = 1

_RUNS = itertools.count()


class Runner(MMRunner):
    """Builds everything from the resolved config and owns the run's state.

    Args:
        cfg: the resolved config as plain containers (see configs/train.yaml); `run_dir` is set.
        test: what `build_test` has built of it.
    """

    def __init__(self, cfg: dict[str, Any], test: dict[str, Any] | None = None) -> None:
        runtime = cfg["runtime"]
        self.device = pick_device(runtime["device"])
        self.prefetch = bool(runtime["prefetch"])
        self.sharded = False
        self.runtime = runtime
        self.settings = cfg
        self._random_state: dict[str, Any] | None = None
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self._resumed_from: Path | None = None
        self._begun = False
        self._saved: tuple[int, Path] | None = None  # step and file of the newest checkpoint
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
        test = test or {"test_dataloader": cfg["test_dataloader"], "test_evaluator": _test_evaluator(cfg)}
        hooks = hook_configs(cfg["custom_hooks"])
        if cfg["ema"] is not None:
            hooks["ema"] = {"type": "core.EMAHook", **cfg["ema"]}
        added = build_hooks(hooks)
        if cfg["media"] is not None and not any(isinstance(hook, MediaHook) for hook in added):
            added.append(MediaHook(**cfg["media"]))
        super().__init__(
            model=cfg["model"],
            work_dir=str(cfg["run_dir"]),
            train_dataloader=cfg["train_dataloader"],
            val_dataloader=cfg["val_dataloader"],
            test_dataloader=test["test_dataloader"],
            train_cfg=cfg["train_cfg"],
            val_cfg=_loop(cfg, "val"),
            test_cfg=_loop(cfg, "test"),
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
            custom_hooks=added,
            launcher="pytorch" if dist.is_initialized() else "none",
            env_cfg={"cudnn_benchmark": runtime["cudnn_benchmark"]},
            visualizer=cfg["visualizer"],
            randomness={"seed": cfg["seed"], "deterministic": runtime["deterministic"]},
            experiment_name=f"{cfg['name']}_{next(_RUNS)}",  # mmengine keeps one logger per name for the whole process
            cfg={"compile": False, "experiment": cfg},
        )

    # ------------------------------------------------------------------ building
    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Plain log file ``run.log`` in the run's folder, besides the console; a resumed run appends to it."""
        self._remove_empty(self._log_dir)
        self._log_dir = self._work_dir
        log_warnings(self._work_dir, self.rank)
        return super().build_logger(log_level, log_file or os.path.join(self._work_dir, "run.log"), **kwargs)

    @staticmethod
    def _remove_empty(folder: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(folder)

    @config_key("visualizer")
    def build_visualizer(self, visualizer: Any = None) -> Any:
        """The config's visualizer; only the first process writes."""
        cfg = dict(visualizer or {"type": "Visualizer"})
        if self.rank != 0:
            cfg["vis_backends"] = None
        else:
            cfg["vis_backends"] = [dict(b) for b in cfg.get("vis_backends") or []] or None
        cfg.setdefault("name", self._experiment_name)
        cfg.setdefault("save_dir", self._work_dir)
        return VISUALIZERS.build(cfg)

    @config_key("model")
    def build_model(self, model: Any) -> nn.Module:
        """The trainer, with frozen parts frozen; or an OpenMMLab model, with the initial weights that its config names.

        A trainer is initialised when it is built. OpenMMLab models are by `init_weights`, which may read files: that is
        left out where a checkpoint overwrites all of it, and comes before `load_from`.
        """
        built = model if isinstance(model, nn.Module) else build(model)
        if self.settings["train_dataloader"] is not None and not any(True for _ in built.parameters()):
            raise ConfigError(f"{type(built).__name__} has no parameters to train, made of {shown(model)}")
        if isinstance(built, Trainer):
            built.freeze()
            built.precision = self.runtime["precision"]
            return built
        if not callable(getattr(built, "train_step", None)):
            raise ConfigError(f"{model['type']} builds a {type(built).__name__}, which is not a core.Trainer")
        overwritten = self.settings["train_dataloader"] is None or self.settings.get("resume_from")
        if hasattr(built, "init_weights") and not overwritten:
            built.init_weights()
        if self.runtime["precision"] != "fp32":
            keep_boxes_exact(built)
        return built

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Places the trainer: device, memory format, compilation, DDP or FSDP2.

        Raises:
            ConfigError: FSDP is asked for without several processes, or for a model that is no Trainer.
        """
        runtime = self.runtime
        with config_key("load_from"):
            self._load_initial_weights(model)
        if runtime["channels_last"]:
            model = model.to(memory_format=torch.channels_last)
        model = place_batch_norms(model, self.device, synchronised=runtime["sync_batchnorm"])
        if runtime["fsdp"] is not None:
            if not dist.is_initialized():
                raise ConfigError(
                    "runtime.fsdp needs several processes: torchrun --nproc-per-node N tools/train.py ..."
                )
            if not isinstance(model, Trainer):
                raise ConfigError("runtime.fsdp works with trainers derived from core.Trainer")
            model = model.to(self.device)
            with config_key("runtime.fsdp"):
                shard(model, self.device, **runtime["fsdp"])
            self.sharded = True
        else:
            model = model.to(self.device)
        if runtime["compile"]:
            options = runtime["compile"] if isinstance(runtime["compile"], dict) else {}
            for network in networks(model).values():
                network.compile(**options)
        if self.sharded or not dist.is_initialized():
            return model
        return self._data_parallel(model, model_wrapper_cfg)

    def _data_parallel(self, model: nn.Module, model_wrapper_cfg: dict | None) -> nn.Module:
        if model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        unused = self.runtime["find_unused_parameters"]
        if unused is None:  # a phase of an adversarial step leaves the other networks' parameters without gradients
            several = bool(getattr(model, "optimizer_parts", ()))
            unused = several or "optimizer" not in (self.settings["optim_wrapper"] or {"optimizer": None})
        wrapper = DataParallelTrainer if isinstance(model, Trainer) else MMDistributedDataParallel
        return wrapper(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=unused,
        )

    def build_dataloader(self, dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> Any:
        """See `core.data.loader.build_loader`; training loaders are those of the config's `train_dataloader`.

        A trainer may put what it derived from a training set in the set's place (`core.Trainer.training_data`).
        """
        if not isinstance(dataloader, dict):
            return dataloader
        training = dataloader is self._train_dataloader
        cfg = dict(dataloader)
        trainer = unwrap(self.model)
        if training and isinstance(trainer, Trainer):
            with config_key("dataset"):
                original = build(cfg["dataset"], DATASETS)
            cfg["dataset"] = trainer.training_data(original)
            if self._beginning is not None and cfg["dataset"] is not original:
                self._beginning.derived(cfg["dataset"])
        if self.runtime["debug"]:
            cfg["num_workers"] = 0
        return build_loader(cfg, seed=self.seed, training=training)

    def build_train_loop(self, loop: Any) -> Any:
        """`core.TrainLoop` unless the config names another."""
        if isinstance(loop, BaseLoop):
            return loop
        with config_key("train_dataloader"):
            loader = self.build_dataloader(self._train_dataloader)
        with config_key("train_cfg"):
            return build({"type": "core.TrainLoop", **loop}, LOOPS, runner=self, dataloader=loader)

    def build_val_loop(self, loop: Any) -> Any:
        """`core.EvalLoop` unless the config names another."""
        return self._build_eval_loop(loop, "val", self._val_dataloader, self._val_evaluator)

    def build_test_loop(self, loop: Any) -> Any:
        """`core.EvalLoop` unless the config names another."""
        return self._build_eval_loop(loop, "test", self._test_dataloader, self._test_evaluator)

    def _build_eval_loop(self, loop: Any, split: str, dataloader: Any, evaluator: Any) -> Any:
        if isinstance(loop, BaseLoop):
            return loop
        several = isinstance(dataloader, dict) and eval_sets.KEY in dataloader
        cfg = {"type": "core.EvalSetsLoop" if several else "core.EvalLoop", **loop}
        if cfg["type"] in ("core.EvalLoop", "core.EvalSetsLoop"):
            cfg["split"] = split
        if several:
            return build(cfg, LOOPS, runner=self, dataloader=dataloader, evaluator=evaluator)
        with config_key(f"{split}_dataloader"):
            loader = self.build_dataloader(dataloader)
        own = split == "val" or self.settings["test_evaluator"] is not None
        with config_key(f"{split if own else 'val'}_evaluator"):
            judge = self.build_evaluator(evaluator)
        with config_key(f"{split}_cfg"):
            return build(cfg, LOOPS, runner=self, dataloader=loader, evaluator=judge)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """See `core.evaluators.build_evaluator`."""
        return build_evaluator(evaluator)

    def train(self) -> nn.Module:
        """As mmengine's, with the test loop built first: a wrong setting of it ends the run before anything is trained.

        Training draws the same random numbers as without one.
        """
        with preserved_random_state():
            _ = self.test_loop
        return super().train()

    @config_key("optim_wrapper")
    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Through `core.OptimConstructor`, in the run's precision, unless the config names another constructor."""
        cfg = dict(optim_wrapper)
        cfg.setdefault("constructor", "core.OptimConstructor")
        if cfg["constructor"] != "core.OptimConstructor":
            return super().build_optim_wrapper(cfg)
        from core.param_groups import OptimConstructor

        cfg.pop("constructor")
        return OptimConstructor(cfg, precision=self.runtime["precision"])(self.model)

    @config_key("param_scheduler")
    def build_param_scheduler(self, scheduler: Any) -> Any:
        """As mmengine; schedules that ask for the run's length are told.

        Raises:
            ConfigError: schedules by name of optimizers that do not exist. One that is not named has no schedule.
        """
        if isinstance(scheduler, dict) and "type" not in scheduler:
            names = list(self.optim_wrapper.keys()) if isinstance(self.optim_wrapper, OptimWrapperDict) else []
            for name in scheduler:
                if name not in names:
                    there = (
                        f"the optimizers are {', '.join(names)}" if names else "there is one optimizer, without a name"
                    )
                    raise ConfigError(f"param_scheduler.{name}: {there}{nearest(name, names)}")
            scheduler = {name: scheduler.get(name) or [] for name in names}
        built = super().build_param_scheduler(scheduler)
        groups = built.values() if isinstance(built, dict) else [built]
        for schedule in (s for group in groups for s in group):
            if hasattr(schedule, "resolve"):
                schedule.resolve(self.train_loop.max_iters, self.train_loop.steps_per_epoch)
        return built

    def _build_param_scheduler(self, scheduler: Any, optim_wrapper: Any) -> list[Any]:
        """As mmengine, which asks for the number of batches of an endless sampler."""
        loop, built = self.train_loop, []
        for cfg in scheduler if isinstance(scheduler, list | tuple) else [scheduler]:
            if not isinstance(cfg, dict):
                built.append(cfg)
                continue
            end = loop.max_epochs if cfg.get("by_epoch", True) else loop.max_iters
            given = {"optimizer": optim_wrapper, "epoch_length": loop.steps_per_epoch}
            built.append(PARAM_SCHEDULERS.build({"end": end, **cfg}, default_args=given))
        return built

    def autocast(self) -> contextlib.AbstractContextManager:
        """The run's precision in evaluation, for models that do not see to it themselves as trainers do."""
        if isinstance(unwrap(self.model), Trainer):
            return contextlib.nullcontext()
        return autocast(self.runtime["precision"], self.device.type)

    def place(self, batch: Any) -> Any:
        """A batch that the prefetcher has brought to the device, in the run's memory format."""
        if not self.runtime["channels_last"] or not isinstance(batch, dict):
            return batch
        return {
            key: value.contiguous(memory_format=torch.channels_last)
            if isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()
            else value
            for key, value in batch.items()
        }

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Any] | None:
        """Everything that an exact continuation needs, as plain tensors and numbers; None except on the first process.

        Collective: every process has to call it.
        """
        self.reconcile_buffers()
        model = unwrap(self.model)
        model_state = full_model_state(model) if self.sharded else model.state_dict()
        optim_state = self.optim_wrapper.state_dict()
        hooks = {name: hook.state_dict() for name, hook in self._hooks_with_state().items()}
        position = self.train_loop.state_dict()
        states: list[Any] = [None] * self.world_size
        if dist.is_initialized():
            dist.all_gather_object(states, random_state())
        else:
            states[0] = random_state()
        if self.rank != 0:
            return None
        return {
            "format": FORMAT,
            "step": self.iter,
            "position": position,
            "model": model_state,
            "optim": optim_state,
            "schedulers": scheduler_states(self.param_schedulers),
            "regime": regime(self),
            "hooks": hooks,
            "random": states,
            "seconds": self.seconds,
            "beginning": self._beginning.state_dict() if self._beginning else None,
            "name": self.settings["name"],
            "seed": self.seed,
            "versions": versions(),
        }

    def reconcile_buffers(self) -> None:
        """One value for every buffer, of the model and of averages that hooks keep of it. Collective.

        See `core.buffers`.
        """
        if self.world_size == 1:
            return
        reconcile_module(unwrap(self.model))
        for hook in self.hooks:
            if isinstance(ema := getattr(hook, "ema", None), EMA):
                reconcile(ema.averaged_buffers())
            if isinstance(module := getattr(hook, "ema_model", None), nn.Module):  # mmengine's
                reconcile_module(module)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, those of earlier processes up to the checkpoint included."""
        return self._seconds_before + time.perf_counter() - self._started

    def _hooks_with_state(self) -> dict[str, Any]:
        """Hooks that keep something, by class; a second one of a class is ``Name#2``, in the order of the hooks."""
        found: dict[str, Any] = {}
        for hook in self.hooks:
            if hasattr(hook, "state_dict"):
                name = type(hook).__name__
                count = sum(type(other).__name__ == name for other in found.values())
                found[f"{name}#{count + 1}" if count else name] = hook
        return found

    def save_state(self, must: bool = False, interim: bool = False) -> Path | None:
        """Writes a checkpoint, once for a step; a full disk leaves the earlier ones intact and is reported.

        Args:
            must: not being able to write is an error instead of a warning.
            interim: the checkpoint stays until the next one is written (see `core.checkpoint.CheckpointStore.save`).

        Returns:
            The file, on every process; None when it could not be written.

        Raises:
            CheckpointWriteError: with `must`.
        """
        if self._saved is not None and self._saved[0] == self.iter:
            if self.rank == 0 and not interim:
                self.store.keep(self.iter)
            return self._saved[1]
        if hasattr(self.train_loop, "confirm"):
            self.train_loop.confirm()
        state = self.state()
        outcome: list[Any] = [None]
        if state is not None:
            try:
                outcome = [self.store.save(state, step=self.iter, interim=interim)]
            except CheckpointWriteError as error:
                newest = self.store.newest()
                self.logger.error(f"checkpoint of step {self.iter} not written: {error}; the newest whole is {newest}")
                outcome = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], CheckpointWriteError):
            if must:
                raise outcome[0]
            return None
        self._saved = self.iter, outcome[0]
        return outcome[0]

    def annotate_state(self, metrics: dict[str, Any]) -> None:
        """Adds figures of exactly these weights to their checkpoint, where there is one."""
        if self.rank == 0 and self._saved is not None and self._saved[0] == self.iter:
            self.store.annotate(self.iter, metrics)

    def farewell(self, where: str) -> str:
        """What a stopped run says: where it was, what is saved, how it goes on."""
        if self._train_loop is None:
            return f"stopped {where}"
        if self._saved is None:
            return f"stopped {where}; the state could not be saved (see run.log)"
        step, path = self._saved
        older = "" if step == self.iter else f", the state of step {step} (later ones could not be written)"
        return f"stopped {where}; saved {path}{older}; go on with resume=auto"

    def save_debug_state(self, step: int, terms: dict[str, float], batch: Any) -> Path:
        """What there is to look at after a loss or gradient that is not finite: weights, batch and terms of `step`.

        Not collective, so of sharded weights this process's part.
        """
        path = Path(self.work_dir) / "debug" / f"nonfinite_step_{step:08d}_rank{self.rank}.pt"
        model = {name: local(value) for name, value in unwrap(self.model).state_dict().items()}
        state = {"step": step, "terms": terms, "batch": _plain(batch), "model": model}
        save_atomic(state, path)
        return path

    def load_or_resume(self) -> None:
        """Goes on from `settings.resume_from` when the launcher found a checkpoint to resume."""
        path = self.settings.get("resume_from")
        if path and not self._has_loaded:
            self._restore(Path(path))
        self._has_loaded = True

    def _restore(self, path: Path) -> None:
        state = load(path)
        if state.get("format") != FORMAT:
            raise ConfigError(f"{path} is no checkpoint of a run (weights alone go into load_from)")
        kinds = {"model": dict, "position": dict, "hooks": dict, "random": list, "step": int}
        wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind) or state[key] == []]
        if wrong:
            raise ConfigError(
                f"{path} is damaged: {', '.join(wrong)} of the run is not in it; resume from an earlier one"
            )
        if len(state["random"]) != self.world_size:
            self.logger.warning(
                f"{path} was written by {len(state['random'])} processes, this run has {self.world_size}: "
                "it goes on, but random draws differ from an uninterrupted run"
            )
        self._restore_model(state)
        self.train_loop.load_state_dict(state["position"])
        restore_regime(self, state)
        for name, hook in self._hooks_with_state().items():
            if hasattr(hook, "load_state_dict") and name in state["hooks"]:
                hook.load_state_dict(state["hooks"][name])
        self._seconds_before = state.get("seconds", 0.0)
        self._random_state = state["random"][self.rank % len(state["random"])]
        self._resumed_from = path
        if path.resolve() == self.store.path(self.iter).resolve():
            self._saved = self.iter, path
        self.logger.info(f"resumed from {path} at step {self.iter}")

    def _restore_model(self, state: dict[str, Any]) -> None:
        model = unwrap(self.model)
        if self.sharded:
            load_full_model_state(model, state["model"])
        else:
            load_state(model, state["model"])

    def use_best(self) -> Path | None:
        """Puts back what the best checkpoint was evaluated with: its weights, and those that hooks put in their place.

        A hook that evaluates with weights of its own (an average) says ``evaluation_weights = True``.

        Returns:
            The checkpoint; None where no checkpoint was judged.
        """
        chosen = [self.store.best() if self.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen, src=0)  # only the first process knows the index to be up to date
        path = chosen[0]
        if path is None:
            return None
        state = load(path)
        self._restore_model(state)
        for hook in self.hooks:
            if getattr(hook, "evaluation_weights", False) and type(hook).__name__ in state["hooks"]:
                hook.load_state_dict(state["hooks"][type(hook).__name__])
        self.evaluated_step = state["step"]
        self.logger.info(f"the final evaluation is that of the best checkpoint, {path}")
        return path

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """As mmengine's, but a run begins once: hooks that then copy the weights would do so again before the test."""
        if fn_name == "before_run":
            if self._begun:
                return
            self._begun = True
        super().call_hook(fn_name, **kwargs)

    def restore_random_state(self) -> None:
        """Puts the random generators where the resumed run had them; once, when the data iterator exists."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def keep_random_state(self) -> None:
        """Lets `restore_random_state` put the generators where they are now."""
        self._random_state = random_state()

    def _load_initial_weights(self, model: nn.Module) -> None:
        """Gives the model the weights that the run begins with, or, where it goes on, those that it began with.

        The checkpoint to go on from comes last (`load_or_resume`); what is derived from weights before, as training
        data, is then derived from the same ones as in the first leg.

        """
        from core.weights import load_sources

        resumed = self.settings.get("resume_from")
        warn = "load_from: %s\nThe run goes on all the same: its checkpoint has all weights"
        tolerate = (lambda error: self.logger.warning(warn, error)) if resumed else None
        for line in load_sources(model, self.settings["load_from"], tolerate):
            self.logger.info(line)
        if not derives_data(model):
            return
        self._beginning = Beginning(model, load(resumed) if resumed else None)
        if taken := self._beginning.taken:
            self.logger.warning(
                f"{len(taken)} weights ({taken[0]}, ...) are no longer given by load_from and the model's files as the "
                f"run began with them: those of {resumed} are taken"
            )

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


def build_test(cfg: dict[str, Any]) -> dict[str, Any]:
    """`test_dataloader` and `test_evaluator` of a config with data set and evaluator built, for a `Runner` to come."""
    loader = cfg["test_dataloader"]
    loaders = eval_sets.loaders(loader, "test_dataloader")
    judges = eval_sets.evaluators(_test_evaluator(cfg), list(loaders), "test_evaluator")
    with preserved_random_state():
        seed_sample(cfg["seed"])
        built = {}
        for name, one in loaders.items():
            with config_key(eval_sets.place("test_dataloader", name)), config_key("dataset"):
                built[name] = {**one, "dataset": build(one["dataset"], DATASETS)}
        with config_key("val_evaluator" if cfg["test_evaluator"] is None else "test_evaluator"):
            judges = {name: build_evaluator(copy.deepcopy(one)) for name, one in judges.items()}
    if "" in built:
        return {"test_dataloader": built[""], "test_evaluator": judges[""]}
    return {"test_dataloader": {eval_sets.KEY: built}, "test_evaluator": {eval_sets.KEY: judges}}


def _test_evaluator(cfg: dict[str, Any]) -> Any:
    """What the test split is judged by: as the validation split, unless the config says something else."""
    if cfg["test_dataloader"] is None:
        return None
    return cfg["val_evaluator"] if cfg["test_evaluator"] is None else cfg["test_evaluator"]


def _plain(batch: Any) -> Any:
    """A batch without what `torch.load` would have to trust: tensors, numbers and texts in dicts and lists."""
    if isinstance(batch, torch.Tensor):
        return batch.cpu()
    if isinstance(batch, BaseDataElement):
        return {**_plain(batch.metainfo), **_plain(dict(batch.items()))}
    if isinstance(batch, dict):
        return {str(key): _plain(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_plain(value) for value in batch]
    if batch is None or isinstance(batch, str | int | float):
        return batch
    inner = getattr(batch, "tensor", None)  # mmdet's boxes
    return inner.cpu() if isinstance(inner, torch.Tensor) else repr(batch)


def _loop(cfg: dict[str, Any], split: str) -> dict[str, Any] | None:
    if cfg[f"{split}_dataloader"] is None:
        return None
    return cfg[f"{split}_cfg"] or {}


def pick_device(name: str) -> torch.device:
    """The device of this process: "auto" is CUDA where there is one.

    Raises:
        ConfigError: "cuda" without one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("runtime.device=cuda, but PyTorch sees no CUDA device (runtime=cpu runs on the CPU)")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device={name}: there is no such device, it takes auto, cpu or cuda") from error


def versions() -> dict[str, str]:
    """Python's and the main libraries' versions."""
    import importlib.metadata as metadata

    names = ("torch", "torchvision", "timm", "onedl-mmengine")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


logging.getLogger("mmengine").setLevel(logging.WARNING)
