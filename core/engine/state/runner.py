"""What a run saves and how it is put back: the state of an exact continuation, and what else is kept of its weights."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.runner import Runner as MMRunner
from mmengine.structures import BaseDataElement
from torch import nn

from core.checkpoint import CheckpointWriteError, load, load_state, save_atomic
from core.checkpoint.plain import unpack
from core.engine.state.hooks import keeps_itself, named
from core.engine.state.randomness import random_state, set_random_state
from core.errors import ConfigError
from core.optim.buffers import reconcile, reconcile_module
from core.optim.dtensor import local
from core.optim.ema import EMA
from core.optim.fsdp import full_model_state, load_full_model_state
from core.optim.regime import regime, restore_regime, scheduler_states
from core.trainer import unwrap

FORMAT = 1


class RunState(MMRunner):
    """The part of `core.engine.runner.Runner` that saves and restores."""

    def state(self) -> dict[str, Any] | None:
        """Everything that an exact continuation needs, as plain tensors and numbers; None except on the first process.

        Collective: every process has to call it.
        """
        self.reconcile_buffers()
        model = unwrap(self.model)
        model_state = full_model_state(model) if self.sharded else model.state_dict()
        optim_state = self.optim_wrapper.state_dict()
        schedulers = scheduler_states(self.param_schedulers)
        said = {name: hook.state_dict() for name, hook in self._hooks_with_state().items()}
        hooks = self.memory.packed("{}.state_dict()", said, copies=False)
        kept = self.memory.state(model_state, optim_state, schedulers)
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
            "schedulers": schedulers,
            "regime": regime(self),
            "hooks": hooks,
            "kept": kept,
            "random": states,
            "seconds": self.seconds,
            "beginning": self._beginning.state_dict() if self._beginning else None,
            "name": self.settings["name"],
            "seed": self.seed,
            "versions": versions(),
        }

    def reconcile_buffers(self) -> None:
        """One value for every buffer, of the model and of averages that hooks keep of it. Collective.

        See `core.optim.buffers`.
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
        """Hooks that say what they keep, by name."""
        return named(hook for hook in self.hooks if keeps_itself(hook))

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
            if name in state["hooks"]:
                hook.load_state_dict(unpack(state["hooks"][name]))
        if "kept" in state:  # not in checkpoints of former versions
            self.memory.restore(state)
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
                hook.load_state_dict(unpack(state["hooks"][type(hook).__name__]))
        if "kept" in state:
            self.memory.give_back(state)
        self.evaluated_step = state["step"]
        self.logger.info(f"the final evaluation is that of the best checkpoint, {path}")
        return path

    def restore_random_state(self) -> None:
        """Puts the random generators where the resumed run had them; once, when the data iterator exists."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def keep_random_state(self) -> None:
        """Lets `restore_random_state` put the generators where they are now."""
        self._random_state = random_state()


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


def versions() -> dict[str, str]:
    """Python's and the main libraries' versions."""
    import importlib.metadata as metadata

    names = ("torch", "torchvision", "timm", "onedl-mmengine")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}
