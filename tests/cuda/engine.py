"""Checks of the engine on the tiny experiment of core's tests, and of the copies that run beside a step."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from core.checkpoint import load
from core.checkpoint.run_folder import find_checkpoint
from core.config import compose
from core.data.loading.batch import LoadedBatch
from core.data.loading.prefetch import DevicePrefetcher
from core.data.loading.tree import pin
from core.engine.launch import run

from .steps import Failed, Figures, finish

WORDS = (
    "model.network.dropout=0.2",
    "ema={decay: 0.9}",
    "train_cfg.max_epochs=3",
    "checkpoint.every_steps=7",
    "checkpoint.keep_last=10",
    "train_dataloader.num_workers=2",
)


class Lab:
    """The tiny experiment in a folder of its own.

    Args:
        folder: where its package, configs and runs go.
        device: of the runs.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
        self.tiny = importlib.import_module("tiny_experiment")
        (folder / "configs" / "experiment" / "mine").mkdir(parents=True, exist_ok=True)
        (folder / "mypoints.py").write_text(self.tiny.PACKAGE)
        (folder / "configs" / "experiment" / "mine" / "tiny.yaml").write_text(self.tiny.EXPERIMENT)
        sys.path.insert(0, str(folder))

    def run(self, name: str, *words: str) -> Path:
        """Trains in this process; returns the run's folder."""
        target = self.folder / "runs" / name
        words = ("experiment=mine/tiny", f"runtime.device={self.device.type}", f"run_dir={target}", *WORDS, *words)
        run(compose(words, config_dir=self.folder / "configs"))
        return target


def resume(lab: Lab) -> Figures:
    """A run that goes on from a checkpoint inside an epoch ends with the very weights of one that was left alone."""
    whole, again = lab.run("whole"), lab.run("again")
    (again / "result.json").unlink()
    for path in (again / "checkpoints").glob("step_*.pt"):
        if path.name != "step_00000014.pt":
            path.unlink()
    lab.run("again", "resume=auto")
    _same_weights(whole, again)
    return {"steps": load(find_checkpoint(again))["step"]}


def torchrun(lab: Lab) -> Figures:
    """tools/train.py under torchrun with one process (NCCL on a GPU): the weights of a run without it."""
    alone, target = lab.run("alone"), lab.folder / "runs" / "torchrun"
    words = (f"runtime.device={lab.device.type}", f"run_dir={target}", *WORDS)
    done = subprocess.run(
        lab.tiny.command_line(*words, torchrun=1),
        cwd=lab.folder,
        env=lab.tiny.environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    if done.returncode:
        raise Failed(f"torchrun ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    _same_weights(alone, target, tolerance=1e-6)
    return {"steps": load(find_checkpoint(target))["step"]}


def _same_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    first, second = (load(find_checkpoint(folder)) for folder in (one, other))
    if first["step"] != second["step"]:
        raise Failed(f"{one.name} has {first['step']} steps, {other.name} {second['step']}")
    average = "EMAHook"
    for part in (lambda s: s["model"], lambda s: s["hooks"][average]["average"]):
        for name, value in part(first).items():
            twin = part(second)[name]
            same = torch.equal(value, twin) if not tolerance else torch.allclose(value, twin, tolerance, tolerance)
            if not same:
                off = (value.double() - twin.double()).abs().max()
                raise Failed(f"{name} differs by {off:.2e} between {one.name} and {other.name}")


class NoWaiting(Hook):
    """From the third step on, nothing from a batch's arrival to the last hook behind its step may wait for the GPU.

    The last step is left out: the log is written there, which reads the device.
    """

    priority = "LOWEST"
    watched = 0

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if 2 <= runner.iter < runner.max_iters - 1:
            NoWaiting.watched += 1
            _sync_is("error")

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        _sync_is("default")


def _sync_is(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def no_waiting(lab: Lab) -> Figures:
    """Steps, the watch over losses and gradients, logging inside a window and averages never wait for the GPU."""
    NoWaiting.watched = 0
    try:
        lab.run(
            "unwatched",
            "log_every=1000",
            "++optim_wrapper.clip_grad={max_norm: 1.0}",
            "custom_hooks=[{type: tests.cuda.engine.NoWaiting}]",
        )
    finally:
        _sync_is("default")
    if NoWaiting.watched < 20:
        raise Failed(f"only {NoWaiting.watched} steps were watched")
    return {"steps": NoWaiting.watched}


class Batches:
    """Batches in page-locked memory, as the loader's pinning thread hands them over."""

    def __init__(self, count: int, megabytes: int, pinned: bool) -> None:
        made = LoadedBatch({"image": torch.rand(megabytes * 2**18)}, [])
        self.batch = LoadedBatch(pin(made.data), []) if pinned else made
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[LoadedBatch]:
        return iter([self.batch] * self.count)


def prefetch(device: torch.device, count: int = 20, megabytes: int = 256) -> Figures:
    """The copy of the next batch runs beside the step: at least half of the copies' time is hidden.

    The step is as many matrix products as take about twice the time of a copy. On a CPU the batches are not copied:
    the same batches have to come, and no time is judged.
    """
    cuda = device.type == "cuda"
    batches = Batches(count, megabytes if cuda else 1, pinned=cuda)
    matrix = torch.rand(4096 if cuda else 64, 4096 if cuda else 64, device=device)

    def step(products: int) -> None:
        for _ in range(products):
            torch.mm(matrix, matrix)

    def timed(work: Any) -> float:
        work()
        finish(device)
        begun = time.perf_counter()
        work()
        finish(device)
        return time.perf_counter() - begun

    copy = timed(lambda: [b.data["image"].to(device) for b in batches]) / count
    products = max(1, round(2 * copy / max(timed(lambda: step(20)) / 20, 1e-6))) if cuda else 1

    def epoch(enabled: bool) -> None:
        for _ in DevicePrefetcher(batches, device, enabled=enabled):
            step(products)

    alone = timed(lambda: [step(products) for _ in range(count)])
    beside, after = timed(lambda: epoch(True)), timed(lambda: epoch(False))
    seen = [float(batch.data["image"].sum()) for batch in DevicePrefetcher(batches, device)]
    if len(seen) != count or len(set(seen)) != 1:
        raise Failed(f"{len(seen)} batches of {count} came, with sums {sorted(set(seen))}")
    figures = {"copy_ms": 1e3 * copy, "step_ms": 1e3 * alone / count, "epoch_ms": 1e3 * beside, "plain_ms": 1e3 * after}
    if not cuda:
        return figures
    hidden = (after - beside) / max(after - alone, 1e-9)
    if hidden < 0.5:
        raise Failed(f"only {hidden:.0%} of the copies' time is hidden: {figures}")
    return {"hidden": hidden, **figures}
