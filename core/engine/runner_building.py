"""How a run's parts are built from its config: model, loaders, loops, evaluators, optimizers, schedules."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapperDict
from mmengine.registry import PARAM_SCHEDULERS, VISUALIZERS
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as MMRunner
from torch import nn

from core.config.key import config_key
from core.config.kinds import shown
from core.config.registry import DATASETS, LOOPS, build
from core.config.shortened import limits, planned
from core.data.loading.loader import build_loader
from core.data.loading.seeds import preserved_random_state, seed_sample
from core.engine.detection import keep_boxes_exact
from core.engine.keys import eval_sets
from core.errors import ConfigError, nearest
from core.metrics.evaluators import build_evaluator
from core.trainer import Trainer, unwrap


class Building(MMRunner):
    """The part of `core.engine.runner.Runner` that builds."""

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

    def build_dataloader(
        self, dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False, split: str = "test"
    ) -> Any:
        """See `core.data.loading.loader.build_loader`; training loaders are those of the config's `train_dataloader`.

        A trainer may put what it derived from a training set in the set's place (`core.Trainer.training_data`).

        Args:
            dataloader: its config, or built.
            seed, diff_rank_seed: mmengine's; not used.
            split: of an evaluation, whose limits hold (`core.config.shortened`).
        """
        if not isinstance(dataloader, dict):
            return dataloader
        training = dataloader is self._train_dataloader
        cfg = dict(dataloader)
        trainer = unwrap(self.model)
        limited = limits(self.runtime)
        if isinstance(trainer, Trainer):
            trainer.keeps_data = limited.fast is None
        if training and isinstance(trainer, Trainer):
            with config_key("dataset"):
                original = build(cfg["dataset"], DATASETS)
            cfg["dataset"] = trainer.training_data(original)
            if self._beginning is not None and cfg["dataset"] is not original:
                self._beginning.derived(cfg["dataset"])
        if self.runtime["debug"]:
            cfg["num_workers"] = 0
        split = "train" if training else split
        repeat = training and limited.repeat
        return build_loader(cfg, seed=self.seed, training=training, limit=limited.batches[split], repeat=repeat)

    def build_train_loop(self, loop: Any) -> Any:
        """`core.TrainLoop` unless the config names another."""
        if isinstance(loop, BaseLoop):
            return loop
        with config_key("train_dataloader"):
            loader = self.build_dataloader(self._train_dataloader)
        with config_key("train_cfg"):
            built = build({"type": "core.TrainLoop", **loop}, LOOPS, runner=self, dataloader=loader)
        if limits(self.runtime).fast is not None and not hasattr(built, "planned"):
            raise ConfigError(f"runtime.fast_dev_run ends a core.TrainLoop, train_cfg names a {type(built).__name__}")
        return built

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
            loader = self.build_dataloader(dataloader, split=split)
        own = split == "val" or self.settings["test_evaluator"] is not None
        with config_key(f"{split if own else 'val'}_evaluator"):
            judge = self.build_evaluator(evaluator)
        with config_key(f"{split}_cfg"):
            return build(cfg, LOOPS, runner=self, dataloader=loader, evaluator=judge)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """See `core.metrics.evaluators.build_evaluator`."""
        return build_evaluator(evaluator)

    @config_key("optim_wrapper")
    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Through `core.OptimConstructor`, in the run's precision, unless the config names another constructor."""
        cfg = dict(optim_wrapper)
        cfg.setdefault("constructor", "core.OptimConstructor")
        if cfg["constructor"] != "core.OptimConstructor":
            return super().build_optim_wrapper(cfg)
        from core.optim.groups import OptimConstructor

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
                schedule.resolve(*planned(self.train_loop))
        return built

    def _build_param_scheduler(self, scheduler: Any, optim_wrapper: Any) -> list[Any]:
        """As mmengine, which asks for the number of batches of an endless sampler."""
        loop, built = self.train_loop, []
        for cfg in scheduler if isinstance(scheduler, list | tuple) else [scheduler]:
            if not isinstance(cfg, dict):
                built.append(cfg)
                continue
            steps, per_epoch = planned(loop)
            end = steps
            if cfg.get("by_epoch", True):
                end = -(-steps // per_epoch) if per_epoch else loop.max_epochs
            given = {"optimizer": optim_wrapper, "epoch_length": per_epoch}
            built.append(PARAM_SCHEDULERS.build({"end": end, **cfg}, default_args=given))
        return built


def build_test(cfg: dict[str, Any]) -> dict[str, Any]:
    """`test_dataloader` and `test_evaluator` of a config with data set and evaluator built, for a `Runner` to come."""
    loader = cfg["test_dataloader"]
    loaders = eval_sets.loaders(loader, "test_dataloader")
    judges = eval_sets.evaluators(test_evaluator(cfg), list(loaders), "test_evaluator")
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


def test_evaluator(cfg: dict[str, Any]) -> Any:
    """What the test split is judged by: as the validation split, unless the config says something else."""
    if cfg["test_dataloader"] is None:
        return None
    return cfg["val_evaluator"] if cfg["test_evaluator"] is None else cfg["test_evaluator"]


def eval_loop(cfg: dict[str, Any], split: str) -> dict[str, Any] | None:
    """The config of a split's loop; None where the split has no loader."""
    if cfg[f"{split}_dataloader"] is None:
        return None
    return cfg[f"{split}_cfg"] or {}
