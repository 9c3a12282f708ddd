"""What is checked: one small experiment for every training step that the papers have, found in their configs."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from core.config import compose, experiments, merge, to_dict
from core.data.loading.seeds import seed_sample
from core.data.loading.tree import map_tensors, to_device
from core.engine.keys.check import stage_config
from core.engine.launch import build_trainer
from core.errors import ConfigError, nearest
from core.profile.experiment import Subject as Profiled

BATCH = 2


@dataclass
class Subject:
    """An experiment (or one of its stages) whose training step is checked."""

    name: str
    cfg: dict[str, Any]

    @property
    def paper(self) -> str:
        """The package that it belongs to."""
        return self.name.partition("/")[0]

    @cached_property
    def _shape(self) -> Any:
        """The trainer without memory."""
        return build_trainer(self.cfg, "meta")

    @property
    def kind(self) -> tuple[str, ...]:
        """Paper, class of the trainer, and its parts with an optimizer: subjects of one kind train by the same code."""
        return (self.paper, self.cfg["model"]["type"], *getattr(self._shape, "optimizer_parts", ()))

    @property
    def parameters(self) -> int:
        """Size of the trainer."""
        return sum(parameter.numel() for parameter in self._shape.parameters())

    def build(self, device: torch.device, **runtime: Any) -> Profiled:
        """The trainer with an optimizer on a device; always with the same weights."""
        seed_sample(0)
        torch.manual_seed(0)
        return Profiled.build(merge(self.cfg, {"runtime": runtime}), device, build_trainer)

    def batch(self, built: Profiled) -> dict[str, Any]:
        """A made-up batch, the same on every device: pictures, clips and latents are noise instead of zeros."""
        seed_sample(1)
        made = built.trainer.example_batch(BATCH, "cpu")

        def noise(tensor: torch.Tensor) -> torch.Tensor:
            return torch.rand_like(tensor) if tensor.is_floating_point() and tensor.ndim >= 4 else tensor

        return {key: built.placed(to_device(map_tensors(noise, value), built.device)) for key, value in made.items()}

    def stepper(self, built: Profiled) -> Callable[[], dict[str, torch.Tensor]]:
        """Calls that make a training step each, on one batch, by the trainer's own `train_step`."""
        batch, wrapper = self.batch(built), built.optimizer()
        built.trainer.train()
        seed_sample(2)
        torch.manual_seed(2)
        return lambda: built.trainer.train_step(dict(batch), wrapper)

    def steps(self, built: Profiled, count: int) -> list[dict[str, float]]:
        """The loss terms of so many steps."""
        step = self.stepper(built)
        terms = [step() for _ in range(count)]
        return [{name: float(value) for name, value in one.items()} for one in terms]


def choose(names: Sequence[str] | None, largest: float, folder: Path) -> tuple[list[Subject], list[str]]:
    """The smallest subject of every kind, and what is left out.

    Args:
        names: experiments to look at; None: all.
        largest: millions of parameters above which a subject is left out.
        folder: where papers put files that their stand-ins need.

    Returns:
        The subjects, and one line for every kind that is left out.
    """
    known = experiments()
    for name in names or ():
        if name not in known:
            raise ConfigError(f"experiments={name}: no such experiment{nearest(name, known)}")
    smallest: dict[tuple[str, ...], Subject] = {}
    for name in names or known:
        for subject in _subjects(name):
            best = smallest.get(subject.kind)
            if best is None or subject.parameters < best.parameters:
                smallest[subject.kind] = subject
    kept, left = [], []
    for subject in smallest.values():
        if subject.parameters <= largest * 1e6:
            overrides = _overrides(subject.paper, folder)
            again = _subjects(subject.name.partition(":")[0], overrides)
            kept.append(next(other for other in again if other.name == subject.name))
        else:
            size = f"{subject.parameters / 1e6:.0f} million parameters"
            left.append(f"{subject.kind[1]} is left out: its smallest, {subject.name}, has {size} (largest=)")
    return kept, left


def _subjects(name: str, overrides: Sequence[str] = ()) -> Iterator[Subject]:
    cfg = to_dict(compose([f"experiment={name}", *overrides]))
    if not cfg["stages"]:
        stages = [(name, cfg)]
    else:
        stages = [(f"{name}:{stage['name']}", stage_config(cfg, stage)) for stage in cfg["stages"]]
    yield from (Subject(label, staged) for label, staged in stages if staged["optim_wrapper"])


def _overrides(paper: str, folder: Path) -> list[str]:
    """What ``tests/PAPER/cuda_files.py`` says, if there is one: ``overrides(folder)`` makes files that are not here."""
    if not (Path(__file__).parents[1] / paper / "cuda_files.py").is_file():
        return []
    return importlib.import_module(f"tests.{paper}.cuda_files").overrides(folder / paper)


class DrawsOnCpu(TorchDispatchMode):
    """Random numbers come from the CPU's own generator on every device, so that two devices draw the same."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **kwargs)
        if "generator" in kwargs:
            kwargs["generator"] = None
        given = [a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        device = torch.device((given[0] if given else kwargs.get("device")) or "cpu")
        if device.type == "cpu":
            return function(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        drawn = function(*tree_map(_cpu, args), **tree_map(_cpu, kwargs))
        if function._schema.is_mutable:
            return args[0].copy_(drawn)
        return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, drawn)


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Full float32 products and the plain attention, and the same draws everywhere: what devices can agree on."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with sdpa_kernel(SDPBackend.MATH), DrawsOnCpu():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
