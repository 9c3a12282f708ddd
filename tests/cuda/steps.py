"""Checks of every training step: each gives figures, or raises `Failed` with what is wrong."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from core.data.loading.tree import tensors
from core.engine.runner import Runner

from .subjects import Subject, exact

Figures = dict[str, Any]


class Failed(Exception):
    """A check found something wrong."""


class NotApplicable(Exception):
    """The check has no meaning for this subject or device."""


def agreement(subject: Subject, device: torch.device) -> Figures:
    """CPU against the device in float32: every loss term of two steps, the second behind an update of the weights."""
    pair = subject.build(torch.device("cpu")), subject.build(device)
    with exact():
        here, there = (subject.steps(built, 2) for built in pair)
    first, second = (difference(a, b) for a, b in zip(here, there, strict=True))
    # Adam's first update is as large for a gradient of 1e-7 as for one of 1: the second step is held less strictly.
    if first > 1e-3 or second > 2e-2:
        raise Failed(
            f"loss terms differ by {first:.2e} and, behind an update, {second:.2e}: CPU {here}, device {there}"
        )
    return {"difference": first, "after_update": second}


def precision(subject: Subject, device: torch.device, name: str) -> Figures:
    """Steps in a precision: finite terms and weights, weights that change, and a first loss near float32's."""
    reference = subject.steps(subject.build(device), 1)[0]
    built = subject.build(device, precision=name)
    before = [parameter.detach().clone() for parameter in built.trainer.parameters()]
    start_memory(device)
    terms = subject.steps(built, 10 if name == "fp16" else 4)  # fp16's scaler may skip the first ones
    after = list(built.trainer.parameters())
    if not all(math.isfinite(value) for value in terms[0].values()):
        raise Failed(f"the first step's terms are not finite: {terms[0]}")
    if not all(bool(parameter.isfinite().all()) for parameter in after):
        raise Failed("weights are not finite after the steps")
    if not any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise Failed("no weight has changed")
    off = difference({"loss": reference["loss"]}, {"loss": terms[0]["loss"]})
    if off > 0.1:
        raise Failed(f"the first loss is {terms[0]['loss']:.5g}, in float32 {reference['loss']:.5g}")
    figures = {"difference": off, **peak_memory(device), "ms_a_step": 1e3 * seconds_of(subject, built)}
    return figures if device.type == "cpu" else {**figures, "waits_a_step": waits_of(subject, built)}


def compiled(subject: Subject, device: torch.device) -> Figures:
    """torch.compile of the networks, as ``runtime.compile`` does it: the same first losses as without."""
    plain = subject.steps(subject.build(device), 2)
    torch.compiler.reset()
    if device.type == "cuda":
        from torch._inductor import config

        options, draws = True, config.patch(fallback_random=True)
    else:  # the tracer alone needs no compiler and takes seconds
        options, draws = {"backend": "aot_eager"}, contextlib.nullcontext()
    with draws:
        built = subject.build(device, compile=options)
        begun = time.perf_counter()
        fast = subject.steps(built, 2)
        spent = time.perf_counter() - begun
    off = max(difference({"loss": a["loss"]}, {"loss": b["loss"]}) for a, b in zip(plain, fast, strict=True))
    if off > 2e-2:
        raise Failed(f"the compiled step's losses differ by {off:.2e}: {[t['loss'] for t in (*plain, *fast)]}")
    return {"difference": off, "seconds_to_compile": spent, "ms_a_step": 1e3 * seconds_of(subject, built)}


def channels_last(subject: Subject, device: torch.device) -> Figures:
    """The memory format of ``runtime.channels_last`` changes no loss."""
    plain, other = subject.build(device), subject.build(device, channels_last=True)
    if not any(tensor.ndim == 4 and tensor.is_floating_point() for tensor in tensors(subject.batch(plain))):
        raise NotApplicable("no batch of images")
    with exact():
        first, second = (subject.steps(built, 1)[0] for built in (plain, other))
    off = difference(first, second)
    if off > 1e-3:
        raise Failed(f"loss terms differ by {off:.2e}: {first}, channels last {second}")
    return {"difference": off}


def data_parallel(subject: Subject, device: torch.device) -> Figures:
    """DistributedDataParallel with one process (NCCL on a GPU), wrapped as the runner wraps it: the same losses."""
    alone, wrapped = subject.build(device), subject.build(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    runtime = {**subject.cfg["runtime"], "sync_batchnorm": True}
    runner = SimpleNamespace(runtime=runtime, settings=subject.cfg, device=device)
    with tempfile.TemporaryDirectory() as folder, exact():
        plain = subject.steps(alone, 2)
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            # The trainer's steps go through the wrapper, which it holds.
            wrapper = Runner._data_parallel(runner, wrapped.trainer, None)
            parallel = subject.steps(wrapped, 2)
            del wrapper
        finally:
            dist.destroy_process_group()
    off = max(difference(a, b) for a, b in zip(plain, parallel, strict=True))
    if off > 1e-3:
        raise Failed(f"loss terms differ by {off:.2e}: {plain}, wrapped {parallel}")
    return {"difference": off, "backend": backend}


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest relative difference of two steps' terms; infinity where they have different ones."""
    if one.keys() != other.keys():
        return math.inf
    pairs = [(a, other[name]) for name, a in one.items()]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-3) if a == a and b == b else math.inf for a, b in pairs)


def seconds_of(subject: Subject, built: Any) -> float:
    """The median time of a step, with the device waited for."""
    step, spent = subject.stepper(built), []
    for _ in range(5):
        finish(built.device)
        begun = time.perf_counter()
        step()
        finish(built.device)
        spent.append(time.perf_counter() - begun)
    return sorted(spent)[len(spent) // 2]


def waits_of(subject: Subject, built: Any) -> int:
    """How often a step waits for the GPU, as PyTorch warns of it."""
    step = subject.stepper(built)
    step()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(one.message) for one in said)


def finish(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_memory(device: torch.device) -> None:
    """From here on the peak is counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> Figures:
    """The peak since `start_memory` in MB, where a GPU counts it."""
    return {"peak_mb": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {}
