"""State that hooks keep without saying so: what changed in their attributes, and what they put into checkpoints.

A hook with ``state_dict`` and ``load_state_dict`` says itself what it keeps. Of every other one, the attributes that
are plain (`core.checkpoint.plain`) and have changed since it was built are saved, so that constructor arguments that a
resumed run is given anew stay in force. They are put back twice: before ``before_train``, which may read them, and
after it, which may have set them to what a run begins with. mmengine's hook points ``before_save_checkpoint`` and
``after_load_checkpoint`` are called as mmengine's Runner does, and what hooks add to the checkpoint is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch.distributed as dist
from mmengine.logging import HistoryBuffer
from torch import nn

from core.checkpoint.plain import Unsaveable, pack, same, unpack
from core.errors import ConfigError

#: Attributes of stock hooks that are not state: handles that a run makes anew, clocks, and marks of something that has
#: been done to the model or the data set, which a resumed run has to do again. A hook names its own in
#: ``fresh_after_resume``.
FRESH = {
    "mmengine.IterTimerHook": ("t", "start_iter", "time_sec_tot", "time_sec_test_val"),
    "mmengine.ProfilerHook": ("profiler", "schedule", "on_trace_ready", "_closed"),
    "mmengine.EMAHook": ("src_model", "ema_model"),  # through its hook points
    "mmengine.CheckpointHook": ("file_client", "file_backend", "is_better_than"),
    "mmengine.PrepareTTAHook": ("tta_cfg",),
    "mmdet.YOLOXModeSwitchHook": ("_has_switched", "_restart_dataloader"),
    "mmdet.PipelineSwitchHook": ("_has_switched", "_restart_dataloader"),
    "mmdet.DetVisualizationHook": ("_visualizer",),
    "mmdet.TrackVisualizationHook": ("_visualizer",),
    "mmdet.GroundingVisualizationHook": ("_visualizer",),
}
_OF_THIS_RUN = {"cfg", "seed", "experiment_name", "mmengine_version", "iter", "epoch", "max_iters", "max_epochs"}


def named(hooks: Iterable[Any]) -> dict[str, Any]:
    """Hooks by class; a second one of a class is ``Name#2``, in the order of the hooks."""
    found: dict[str, Any] = {}
    for hook in hooks:
        name = type(hook).__name__
        count = sum(type(other).__name__ == name for other in found.values())
        found[f"{name}#{count + 1}" if count else name] = hook
    return found


def keeps_itself(hook: Any) -> bool:
    """Whether a hook says what it keeps, and takes it back."""
    return hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict")


class HookMemory:
    """What the hooks of a run keep, beside those that say it themselves.

    Args:
        runner: the run, whose hooks have not been called yet.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.hooks = named(hook for hook in runner.hooks if not keeps_itself(hook))
        self._built = {name: _look(hook) for name, hook in self.hooks.items()}
        self._restored: dict[str, Mapping[str, Any]] = {}
        self._moved: Callable[[str], str] = str
        self._told: set[str] = set()

    # ------------------------------------------------------------------ saving
    def state(self, model: Any, optimizer: Any, schedulers: Any) -> dict[str, Any]:
        """What a checkpoint holds of it. Collective: every process has to call it; only the first one's counts.

        Args:
            model: the state dict that is saved.
            optimizer: that of the optimizers.
            schedulers: those of the schedules.
        """
        own = {"hooks": self._changed(), "hub": self._hub()}
        everyone: list[Any] = [own]
        if dist.is_initialized():
            everyone = [None] * self.runner.world_size
            dist.all_gather_object(everyone, own)
        if self.runner.rank != 0:
            return {}
        alike = all(same(own, other) for other in everyone)
        folder = self.runner.work_dir
        return {
            "processes": everyone[:1] if alike else everyone,
            "checkpoint": self._added(self._checkpoint(model, optimizer, schedulers)),
            "run_dir": [os.path.abspath(folder), folder],
        }

    def _changed(self) -> dict[str, dict[str, Any]]:
        found = {}
        for name, hook in self.hooks.items():
            before, now = self._built[name][0], _look(hook)[0]
            kept = {key: value for key, value in now.items() if key not in before or not same(value, before[key])}
            if kept:
                found[name] = kept
        self.report()
        return found

    def _hub(self) -> dict[str, Any]:
        """What hooks leave in mmengine's message hub, where it says that it is to be resumed."""
        hub = self.runner.message_hub
        kept = [key for key, resumed in hub._resumed_keys.items() if resumed and key not in _OF_THIS_RUN]
        infos = {key: value for key, value in hub.runtime_info.items() if key in kept}
        scalars = {key: [*value.data, value.max_length] for key, value in hub.log_scalars.items() if key in kept}
        return {"infos": self.packed("message_hub.{}", infos), "scalars": pack(scalars)}

    def packed(self, title: str, values: Mapping[str, Any], *, copies: bool = True) -> dict[str, Any]:
        """What can be stored of `values`; the rest is named in the log, by its name in `title`."""
        found = {}
        for key, value in values.items():
            try:
                found[key] = pack(value, copies=copies)
            except Unsaveable as error:
                self._tell([f"{title.format(key)} ({error})"])
        return found

    def _checkpoint(self, model: Any, optimizer: Any, schedulers: Any) -> dict[str, Any]:
        """The dictionary that mmengine's hook points are given, with mmengine's keys."""
        runner = self.runner
        return {
            "meta": {"epoch": runner.epoch, "iter": runner.iter, "seed": runner.seed},
            "state_dict": model,
            "optimizer": optimizer,
            "param_schedulers": schedulers,
        }

    def _added(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What ``before_save_checkpoint`` adds to a checkpoint or changes in it: whole keys, or entries of ours."""
        given = {key: dict(value) if isinstance(value, Mapping) else value for key, value in checkpoint.items()}
        self.runner.call_hook("before_save_checkpoint", checkpoint=given)
        added = {}
        for key, value in given.items():
            before = checkpoint.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                changed = {k: v for k, v in value.items() if k not in before or before[k] is not v}
                added.update({key: changed} if changed else {})
            elif key not in checkpoint or value is not before:
                added[key] = value
        return self.packed("checkpoint['{}'] of before_save_checkpoint", added, copies=False)

    # ------------------------------------------------------------------ putting back
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Puts back what a run's checkpoint holds (see `state`), before ``before_train``.

        Raises:
            ConfigError: the checkpoint is damaged there.
        """
        with _readable():
            self._restore(saved["kept"])
        self.give_back(saved)
        if self._restored:
            said = (f"{name} ({', '.join(sorted(values))})" for name, values in self._restored.items())
            self.runner.logger.info(f"hooks go on with what they kept: {', '.join(said)}")

    def _restore(self, kept: Mapping[str, Any]) -> None:
        processes = kept["processes"]
        own = processes[self.runner.rank if len(processes) == self.runner.world_size else 0]
        self._moved = self._relocation(kept["run_dir"])
        hub = self.runner.message_hub
        for key, value in own["hub"]["infos"].items():
            hub.update_info(key, unpack(value, self.runner.device, self._moved))
        for key, (values, counts, length) in unpack(own["hub"]["scalars"]).items():
            hub.log_scalars[key] = HistoryBuffer(values, counts, length)
            hub._resumed_keys[key] = True
        self._restored = {name: values for name, values in own["hooks"].items() if name in self.hooks}
        self.put_back()

    def give_back(self, saved: Mapping[str, Any]) -> None:
        """Calls ``after_load_checkpoint`` with what ``before_save_checkpoint`` left."""
        checkpoint = self._checkpoint(dict(saved["model"]), saved["optim"], saved["schedulers"])
        with _readable():
            for key, value in unpack(saved["kept"]["checkpoint"]).items():
                both = isinstance(value, Mapping) and isinstance(checkpoint.get(key), Mapping)
                checkpoint[key] = {**checkpoint[key], **value} if both else value
        self.runner._resume = True  # mmengine's hooks ask
        self.runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)

    def put_back(self) -> None:
        """The attributes that were restored, as they were in the checkpoint, whatever hooks have made of them since."""
        for name, values in self._restored.items():
            vars(self.hooks[name]).update(unpack(dict(values), self.runner.device, self._moved))

    def begun(self) -> None:
        """``before_train`` is over."""
        self.put_back()
        self._restored = {}
        self.report()

    def _relocation(self, places: list[str]) -> Callable[[str], str]:
        """Texts that lead into the folder of the run that was saved lead into this run's."""
        now = [os.path.abspath(self.runner.work_dir), self.runner.work_dir]

        def moved(text: str) -> str:
            for old, new in zip(places, now, strict=True):
                if text == old or text.startswith(old + os.sep):
                    return new + text[len(old) :]
            return text

        return moved

    # ------------------------------------------------------------------ what is lost
    def report(self) -> None:
        """Names in the log, once and in one line, what would be lost: attributes that hold state and are not plain."""
        own = self._own_objects()
        self._tell(
            f"{name}.{key} ({reason})"
            for name, hook in self.hooks.items()
            if getattr(hook, "changes_training", True)
            for key, (value, reason) in _look(hook)[1].items()
            if id(value) not in own and _counts(value, self._built[name][1].get(key, (None, ""))[0])
        )

    def _own_objects(self) -> set[int]:
        """Parts of the run itself and parts of these (loops, loaders, data sets), which hooks may refer to."""
        found = level = [self.runner]
        for _ in range(3):
            level = [part for owner in level if hasattr(owner, "__dict__") for part in vars(owner).values()]
            found = [*found, *level]
        return {*map(id, found), *map(id, self.runner.model.modules())}

    def _tell(self, names: Iterable[str]) -> None:
        new = [name for name in names if name not in self._told]
        self._told.update(new)
        if new and self.runner.rank == 0:
            self.runner.logger.log(
                logging.WARNING,
                f"not saved in checkpoints, and new after a resume: {', '.join(new)}. A hook that needs them says in "
                "state_dict() and load_state_dict(state) what it keeps; one that does not lists them in its class, "
                "fresh_after_resume = (NAME, ...)",
            )


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the checkpoint is damaged: what hooks keep cannot be read ({type(error).__name__}: {error}); resume from "
            "an earlier one"
        ) from error


def _look(hook: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, str]]]:
    """A hook's plain attributes, packed, and the others with what they are."""
    plain, others = {}, {}
    fresh = _fresh(hook)
    for key, value in vars(hook).items():
        if key in fresh:
            continue
        try:
            plain[key] = pack(value)
        except Unsaveable as error:
            others[key] = (value, str(error))
    return plain, others


def _fresh(hook: Any) -> set[str]:
    found = set(getattr(hook, "fresh_after_resume", ()))
    for kind in type(hook).__mro__:
        found.update(FRESH.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}", ()))
    return found


def _counts(value: Any, built: Any) -> bool:
    """Whether something that cannot be stored may hold state: it came later, or is an object that may have changed."""
    if isinstance(value, logging.Logger | ModuleType):
        return False
    if value is not built:
        return True
    return isinstance(value, nn.Module) or (not callable(value) and bool(getattr(value, "__dict__", None)))
