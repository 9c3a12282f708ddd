"""What a run says about itself while it trains: losses, rates, figures of the evaluation."""

from __future__ import annotations

import datetime
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mmengine.dist import all_gather_object, get_world_size, is_main_process
from mmengine.hooks import Hook

from core.config.registry import HOOKS
from core.data.loading.batch import batch_size
from core.output.backends import each_backend
from core.output.progress import Progress

# Sums of float32 values stay exact in float64, so that neither the order of processes nor a resume changes a digit.
_SUM = torch.float64


@dataclass
class _Window:
    """Sums and counts of every term since the last line."""

    sums: dict[str, float]
    counts: dict[str, int]
    memory: float


@HOOKS.register_module()
class LoggingHook(Hook):
    """Writes mean losses and rates every `interval` steps, and the metrics of every evaluation.

    Losses are summed on their device and read once per window, so that no step waits for the device. Means are over the
    steps of the window and over all processes. Keys: the loss terms, ``lr`` (``lr/<group>`` where groups differ),
    ``momentum`` once it changes, ``grad_norm`` (the last update's, with norm clipping), ``time/step`` and ``time/data``
    (seconds per step, checkpoints and evaluations left out), ``samples_per_second``, ``memory_mb`` (the largest peak of
    a process), ``eta_seconds``; metrics as ``val/<name>`` and ``test/<name>``. The line on the console leaves out the
    only part of a loss, which is the loss; the log has both.

    A window that a checkpoint interrupts is saved with it: the resumed run logs the losses that an uninterrupted one
    does, and the log is cut back to what it was when the checkpoint was written.

    Args:
        interval: steps per window.
        progress: "live": bars; "plain": lines; "auto": bars when standard output is a terminal.

    Raises:
        ValueError: `interval` below 1 or an unknown `progress`.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, interval: int = 50, progress: Literal["auto", "live", "plain"] = "auto") -> None:
        if interval < 1:
            raise ValueError(f"interval={interval}: a window has at least one step")
        if progress not in ("auto", "live", "plain"):
            raise ValueError(f"progress='{progress}': auto, live or plain")
        self.interval = interval
        self.progress_mode = progress
        self.progress: Progress | None = None
        self._visualizer: Any = None
        self._lines: int | None = None
        self._first_momentum: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._reset_times()
        self._paused = True
        self._begun = self._ended = self._train_began = 0.0
        self._steps_here = 0

    def _reset_times(self) -> None:
        self._spent = self._waited = 0.0
        self._timed = self._timed_samples = 0

    # ------------------------------------------------------------------ training
    def before_train(self, runner: Any) -> None:
        """Cuts the log back to the step that the run begins with, and shows the bar."""
        self._visualizer = runner.visualizer
        if is_main_process():
            each_backend(runner.visualizer, "truncate", runner.iter, self._lines)
            self._show(runner).begin("train", runner.max_iters, runner.iter)
        self._lines = None
        self._train_began, self._steps_here, self._paused = time.perf_counter(), 0, True

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The batch is there: what has passed since the last step was waiting for it."""
        self._begun = time.perf_counter()
        if not self._paused:
            self._waited += self._begun - self._ended

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """Adds the step to the window; writes the window when it is full or training is over."""
        step = runner.iter + 1
        self._add(outputs or {})
        due = step % self.interval == 0 or step == runner.max_iters
        merged = self._take() if due else None  # reads the device: the window's time ends after it
        self._ended = time.perf_counter()
        if not self._paused:
            self._timed += 1
            self._timed_samples += batch_size(data_batch)
            self._spent += self._ended - self._begun
        self._paused = False
        self._steps_here += 1
        if self.progress is not None:
            self.progress.advance("train")
        if merged is not None:
            self._write(runner, step, merged)

    def after_train(self, runner: Any) -> None:
        """Writes what is left of a run that stopped early."""
        if any(self._counts.values()) or get_world_size() > 1:
            merged = self._take()
            if merged.counts:
                self._write(runner, runner.iter, merged)
        self._end_progress("train")

    def after_run(self, runner: Any) -> None:
        """Puts the terminal back."""
        if self.progress is not None:
            self.progress.close()

    def _add(self, outputs: Mapping[str, Any]) -> None:
        for name, value in outputs.items():
            if isinstance(value, torch.Tensor):
                value = value.detach()
                value = value.mean(dtype=torch.float32) if value.ndim else value
                total = self._sums.get(name)
                if not isinstance(total, torch.Tensor):
                    dtype = torch.float32 if value.device.type == "mps" else _SUM
                    total = torch.full((), float(total or 0.0), dtype=dtype, device=value.device)
                self._sums[name] = total.to(value.device).add_(value)
            elif isinstance(value, int | float):
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
            else:
                continue
            self._counts[name] = self._counts.get(name, 0) + 1

    def _own_sums(self) -> dict[str, float]:
        """The sums as numbers; the device is read once."""
        tensors = {k: v for k, v in self._sums.items() if isinstance(v, torch.Tensor)}
        by_device: dict[Any, list[str]] = {}
        for name, value in tensors.items():
            by_device.setdefault((value.device, value.dtype), []).append(name)
        read: dict[str, float] = {}
        for names in by_device.values():
            read.update(zip(names, torch.stack([tensors[n] for n in names]).tolist(), strict=True))
        return {name: read.get(name, value) for name, value in self._sums.items()}  # the order of the terms is kept

    def _merged(self) -> _Window:
        """The window over all processes."""
        parts = all_gather_object(_Window(self._own_sums(), dict(self._counts), _peak_memory()))
        merged = _Window({}, {}, max(part.memory for part in parts))
        for part in parts:
            for name, value in part.sums.items():
                merged.sums[name] = merged.sums.get(name, 0.0) + value
                merged.counts[name] = merged.counts.get(name, 0) + part.counts[name]
        return merged

    def _take(self) -> _Window:
        """The window over all processes; a new one begins."""
        merged = self._merged()
        self._sums, self._counts = {}, {}
        return merged

    def _write(self, runner: Any, step: int, window: _Window) -> None:
        losses = {name: value / window.counts[name] for name, value in window.sums.items()}
        if not is_main_process():
            self._reset_times()
            return
        figures = {"epoch": _epoch(runner, step), **losses, **self._rates(runner), **_last_update(runner.optim_wrapper)}
        if self._timed:
            figures["time/step"] = (self._spent + self._waited) / self._timed
            figures["time/data"] = self._waited / self._timed
            figures["samples_per_second"] = (
                self._timed_samples * get_world_size() / max(self._spent + self._waited, 1e-9)
            )
        figures["memory_mb"] = window.memory
        elapsed = time.perf_counter() - self._train_began
        left = elapsed / max(self._steps_here, 1) * max(runner.max_iters - step, 0)
        figures["eta_seconds"] = round(left, 1)
        self._reset_times()
        runner.visualizer.add_scalars(figures, step=step)
        shown = _each_once(losses)
        self._line(runner, self._train_line(runner, step, shown, figures))
        if self.progress is not None:
            self.progress.note("train", "  ".join(f"{k} {v:.4g}" for k, v in list(shown.items())[:4]))

    def _rates(self, runner: Any) -> dict[str, float]:
        """Learning rates, and momenta that have changed since the beginning."""
        figures: dict[str, float] = {}
        for prefix, optimizer in _optimizers(runner.optim_wrapper):
            rates: dict[float, str] = {}
            for index, group in enumerate(optimizer.param_groups):
                rates.setdefault(float(group["lr"]), str(group.get("name", index)))
            if rates:
                figures[f"lr{prefix}"] = max(rates)
            if len(rates) > 1:
                figures.update({f"lr{prefix}/{name}": rate for rate, name in rates.items()})
            momentum = _momentum(optimizer)
            if momentum is not None:
                first = self._first_momentum.setdefault(prefix, momentum)
                if momentum != first:
                    figures[f"momentum{prefix}"] = momentum
        return figures

    def _train_line(self, runner: Any, step: int, losses: Mapping[str, float], figures: Mapping[str, Any]) -> str:
        parts = [f"epoch {figures['epoch']}/{runner.max_epochs}", f"step {step}/{runner.max_iters}"]
        parts += [f"{name} {value:.5g}" for name, value in losses.items()]
        parts += [f"{name} {value:.3g}" for name, value in figures.items() if name == "lr" or name.startswith("lr_")]
        if "time/step" in figures:
            share = figures["time/data"] / max(figures["time/step"], 1e-9)
            parts += [f"{figures['samples_per_second']:.4g} samples/s", f"waiting for data {share:.0%}"]
        left = datetime.timedelta(seconds=round(figures["eta_seconds"]))
        parts += [f"memory {figures['memory_mb']:.0f} MB", f"left {left}"]
        return "  ".join(parts)

    # ------------------------------------------------------------------ evaluation
    def before_val_epoch(self, runner: Any) -> None:
        """Shows the bar of the evaluation."""
        self._begin_evaluation(runner, "val")

    def before_test_epoch(self, runner: Any) -> None:
        """Shows the bar of the evaluation."""
        self._begin_evaluation(runner, "test")

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Counts a batch."""
        if self.progress is not None:
            self.progress.advance("val")

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Counts a batch."""
        if self.progress is not None:
            self.progress.advance("test")

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Writes the metrics."""
        self._end_evaluation(runner, "val", metrics or {})

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Writes the metrics."""
        self._end_evaluation(runner, "test", metrics or {})

    def _begin_evaluation(self, runner: Any, split: str) -> None:
        self._paused = True
        if is_main_process():
            loader = getattr(runner, f"{split}_dataloader", None)
            self._show(runner).begin(split, len(loader) if hasattr(loader, "__len__") else None)

    def _end_evaluation(self, runner: Any, split: str, metrics: Mapping[str, Any]) -> None:
        self._paused = True
        if not is_main_process():
            return
        self._end_progress(split)
        numbers = {f"{split}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        if numbers:
            step = runner.iter
            runner.visualizer.add_scalars({"epoch": _epoch(runner, step), **numbers}, step=step)
            figures = "  ".join(f"{name} {value:.5g}" for name, value in numbers.items())
            self._line(runner, f"step {step}  {figures}", always=True)

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """The open window over all processes. Collective: every process has to call it."""
        window = self._merged()
        self._paused = True  # a checkpoint is being written: that time is no step's
        backends = getattr(self._visualizer, "_vis_backends", {}).values()
        lines = [backend.lines for backend in backends if hasattr(backend, "lines")]
        return {
            "sums": window.sums,
            "counts": window.counts,
            "momentum": dict(self._first_momentum),
            "lines": lines[0] if lines else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the window; the first process holds the share of all."""
        self._first_momentum = dict(state["momentum"])
        self._lines = state["lines"]
        if is_main_process():
            self._sums, self._counts = dict(state["sums"]), dict(state["counts"])

    # ------------------------------------------------------------------ showing
    def _show(self, runner: Any) -> Progress:
        if self.progress is None:
            live = {"auto": None, "live": True, "plain": False}[self.progress_mode]
            self.progress = Progress(runner.logger, live)
        return self.progress

    def _end_progress(self, name: str) -> None:
        if self.progress is not None:
            self.progress.end(name)

    def _line(self, runner: Any, text: str, always: bool = False) -> None:
        """A line for the log; while a bar shows the same, only for the log file."""
        if always or self.progress is None or not self.progress.live:
            runner.logger.info(text)
            return
        record = runner.logger.makeRecord(runner.logger.name, 20, __file__, 0, text, (), None)
        for handler in runner.logger.handlers:
            if hasattr(handler, "baseFilename"):
                handler.handle(record)


def _each_once(losses: Mapping[str, float]) -> dict[str, float]:
    """The terms for people: where the training loss has a single part, that part says nothing more."""
    parts = [name for name in losses if "loss" in name and name != "loss"]
    alone = len(parts) == 1 and losses[parts[0]] == losses.get("loss")
    return {name: value for name, value in losses.items() if not (alone and name == parts[0])}


def _epoch(runner: Any, step: int) -> int:
    """The epoch that a step belongs to, from 1 on; 0 before training."""
    per_epoch = getattr(getattr(runner, "_train_loop", None), "steps_per_epoch", None)
    return -(-step // per_epoch) if per_epoch else runner.epoch + (step > 0)


def _peak_memory() -> float:
    """Peak memory of this process in MB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _last_update(optim_wrapper: Any) -> dict[str, float]:
    """What the optimizer wrapper tells of its last update, e.g. ``grad_norm``."""
    tell = getattr(optim_wrapper, "log_vars", None)
    return {name: float(value) for name, value in tell().items()} if tell is not None else {}


def _optimizers(wrapper: Any) -> list[tuple[str, Any]]:
    """(suffix of the keys, optimizer) of one wrapper or of a dictionary of them."""
    if wrapper is None:
        return []
    if hasattr(wrapper, "optim_wrappers"):
        return [(f"_{name}", inner.optimizer) for name, inner in wrapper.optim_wrappers.items()]
    return [("", wrapper.optimizer)]


def _momentum(optimizer: Any) -> float | None:
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    if "betas" in group:
        return float(group["betas"][0])
    return float(group["momentum"]) if "momentum" in group else None
