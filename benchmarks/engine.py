"""What the engine costs: a training step through it against the same step in a bare PyTorch loop.

  python benchmarks/engine.py [rounds=5] [steps=40] [threads=2] [output=results/benchmarks/engine.json]

Both train the same network on the same loader in one process, in turn. The engine runs as an experiment does: log with
JSON lines and TensorBoard, finite check, schedule, EMA off, a checkpoint at the end. The first steps of every round are
not counted. Wall-clock time is what users wait for; the process's CPU time does not see other programs.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from core.config import compose
from core.config.command.cli import parse, run
from core.data.loading.loader import build_loader
from core.profile.benchmarking import conditions, publish
from core.trainer import Trainer


class Images(torch.utils.data.Dataset):
    """Made-up images in memory."""

    def __init__(self, count: int = 2048, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[int(index)], "label": int(index) % 10, "sample_id": str(int(index))}


class ConvNet(nn.Sequential):
    """A small convolutional network; its training step at batch 32 takes 20 ms or more on a CPU core."""

    def __init__(self, width: int = 32) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1), nn.GELU()]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Classify(Trainer):
    """Cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the labels."""
        return {"loss_ce": nn.functional.cross_entropy(self.network(batch["image"]), batch["label"])}


class Stopwatch(Hook):
    """Notes when each step ends."""

    stamps: ClassVar[list[tuple[float, float]]] = []

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Tensor] | None = None
    ) -> None:
        """Appends the time."""
        self.stamps.append(now())


def now() -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    return time.perf_counter(), time.process_time()


def per_step(stamps: list[tuple[float, float]], skip: int) -> tuple[float, float]:
    """Median wall-clock and CPU seconds of a step."""
    pairs = list(itertools.pairwise(stamps))[skip:]
    return tuple(statistics.median(b[kind] - a[kind] for a, b in pairs) for kind in (0, 1))


LOADER = {"batch_size": 32, "num_workers": 0, "dataset": {"type": "benchmarks.engine.Images"}}
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.05}


def engine_stamps(steps: int, folder: str) -> list[tuple[float, float]]:
    """When each step in the engine ended."""
    from benchmarks.engine import Stopwatch as Registered
    from core.engine.launch import run as launch

    Registered.stamps.clear()
    cfg = compose([f"runs_dir={folder}", "runtime=cpu", "name=benchmark/engine", "log_every=10"])
    cfg.model = {"type": "benchmarks.engine.Classify", "network": {"type": "benchmarks.engine.ConvNet"}}
    cfg.train_dataloader = LOADER
    cfg.train_cfg = {"max_steps": steps}
    cfg.optim_wrapper = {"type": "core.OptimWrapper", "optimizer": {"type": "torch.optim.AdamW", **OPTIMIZER}}
    cfg.param_scheduler = {"type": "core.Schedule", "kind": "warmup_cosine", "by_epoch": False, "warmup": 2}
    cfg.checkpoint.every_steps = 10**9
    cfg.custom_hooks = [{"type": "benchmarks.engine.Stopwatch"}]
    launch(cfg)
    return list(Registered.stamps)


def bare_stamps(steps: int) -> list[tuple[float, float]]:
    """When each step ended in the shortest loop that trains the same."""
    loader = build_loader(LOADER, seed=0, training=True)
    network = ConvNet()
    optimizer = torch.optim.AdamW(network.parameters(), **OPTIMIZER)
    stamps: list[tuple[float, float]] = []
    while len(stamps) < steps:
        for batch, _ in loader:
            loss = nn.functional.cross_entropy(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            stamps.append(now())
            if len(stamps) == steps:
                break
    return stamps


@dataclass
class Options:
    """How long to measure."""

    rounds: int = 5
    steps: int = 40
    skip: int = field(default=8, metadata={"help": "steps at the start of a round that are not counted"})
    threads: int = 2
    output: str | None = "results/benchmarks/engine.json"


def main(argv: list[str]) -> None:
    """Prints the figures and writes them as JSON."""
    options, _ = parse(argv, Options, doc=__doc__)
    torch.set_num_threads(options.threads)
    engine, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for which in ("bare", "engine") if number % 2 else ("engine", "bare"):
                if which == "bare":
                    bare.append(per_step(bare_stamps(options.steps), options.skip))
                else:
                    engine.append(per_step(engine_stamps(options.steps, folder), options.skip))
    figures: dict[str, Any] = {}
    for kind, name in enumerate(("wall", "cpu")):
        ratios = [e[kind] / b[kind] - 1 for e, b in zip(engine, bare, strict=True)]
        figures[name] = {
            "bare_ms": round(1e3 * statistics.median(b[kind] for b in bare), 3),
            "engine_ms": round(1e3 * statistics.median(e[kind] for e in engine), 3),
            "overhead": round(statistics.median(ratios), 4),
            "overhead_per_round": [round(r, 4) for r in ratios],
        }
    figures |= {"steps_per_round": options.steps - options.skip, **conditions(__file__, argv, options)}
    publish(figures, options.output)


if __name__ == "__main__":
    run(main)
