"""What walks cost: the loss over blocks of rows against the plain one, cached features against live, and decoders.

  python benchmarks/slot_walks.py [batch=4] [grid=14] [slots=7] [device=cpu] [parts=[loss,step,cache]] [rounds=7]

`loss` measures forward and backward of the P-W-P and W-P-W walks alone: seconds, and the peak of tensors alive. `step`
measures a training step (backbone, slots, signal, backward; no optimizer) of DINO ViT-S/8 with random weights: walks on
pictures, walks on cached features, and the decoders on cached features. `cache` trains from files with Adam: JPEG
pictures that are drawn for it, through reader, loader and backbone, against features that `FeatureCache` keeps; and it
compares their losses. All candidates take turns in one process; ratios are medians over rounds.

Memory at evaluation size: batch=32 grid=40 parts=[loss]. Features at training size: grid=28 parts=[cache].
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor, nn

# This file has the name of the package that it measures: look for that in the repository, not beside the file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config.command.cli import parse, run
from core.data import build_loader, to_device
from core.profile.benchmarking import conditions, measure, publish
from core.profile.measure import Benchmark, benchmark, peak_memory
from slot_walks import FeatureCache, SlotEncoder, SlotTrainer, SlotWalker, WalkLoss, dino_vits8
from slot_walks.data import Flowers, Square
from slot_walks.standin.blobworld import draw_scene

CHANNELS = 384


@dataclass
class Options:
    """What to measure."""

    batch: int = 4
    grid: int = field(default=14, metadata={"help": "patches along a side: 28 for 224 pixels, 40 for 320"})
    slots: int = 7
    device: str = "cpu"
    parts: list[str] = field(default_factory=lambda: ["loss", "step", "cache"])
    rounds: int = 7
    threads: int = 1
    output: str | None = None


def rounds(timed: Benchmark) -> dict[str, list[float]]:
    """Seconds of every round of each candidate; rounds with one index were taken close together."""
    return {name: [round(one, 5) for one in each] for name, each in timed.seconds.items()}


def loss_pass(impl: str, features: Tensor, slots: Tensor, grid: int) -> Callable[[], None]:
    """Forward and backward of the walks, from features `(B, N, C)` and slots `(B, K, C)`."""
    loss = WalkLoss(impl=impl, target_position="average")

    def once() -> None:
        slots.grad = None
        loss(features, slots, (grid, grid))["loss"].backward()

    return once


def measure_loss(options: Options) -> dict[str, Any]:
    """Seconds and peak of tensors of both implementations, and the ratios plain over stream."""
    tokens = options.grid**2
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(options.batch, tokens, CHANNELS, generator=generator).to(options.device)
    slots = torch.randn(options.batch, options.slots, CHANNELS, generator=generator).to(options.device)
    slots.requires_grad_()
    passes = {impl: loss_pass(impl, features, slots, options.grid) for impl in ("stream", "plain")}
    peak = {name: peak_memory(once, device=options.device).tensors for name, once in passes.items()}
    timed = benchmark(passes, device=options.device, repeats=options.rounds, threads=options.threads)
    return {
        "megabytes": {name: round(value / 2**20, 1) for name, value in peak.items()},
        "memory_ratio": round(peak["plain"] / peak["stream"], 2),
        "milliseconds": {name: round(1e3 * timed.time(name).median, 2) for name in passes},
        "speedup": round(timed.speedup("stream", "plain").median, 3),
        "rounds": rounds(timed),
    }


def step_pass(signal: str, batch: dict[str, Tensor], options: Options) -> Callable[[], None]:
    """Forward and backward of a training step."""
    torch.manual_seed(0)
    backbone = dino_vits8() if "image" in batch else None
    network = SlotWalker(backbone, SlotEncoder(num_slots=options.slots), signal, feature_grid=options.grid)
    trainer: nn.Module = SlotTrainer(network).to(options.device).train()

    def once() -> None:
        trainer.zero_grad()
        total, _ = trainer.parse_losses(trainer.losses(batch))
        total.backward()

    return once


def measure_step(options: Options) -> dict[str, Any]:
    """Seconds of a step, and how many times longer each takes than walks on cached features."""
    side = 8 * options.grid
    picture = {"image": torch.randn(options.batch, 3, side, side, device=options.device)}
    cached = {"features": torch.randn(options.batch, options.grid, options.grid, CHANNELS, device=options.device)}
    passes = {"walk on pictures": step_pass("walk", picture, options)}
    passes |= {signal: step_pass(signal, cached, options) for signal in ("walk", "mlp", "broadcast", "transformer")}
    timed = benchmark(passes, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
    return {
        "milliseconds": {name: round(1e3 * timed.time(name).median, 1) for name in passes},
        "times_walk": {name: round(timed.speedup("walk", name).median, 2) for name in passes if name != "walk"},
        "rounds": rounds(timed),
    }


def training(kept: bool, dtype: str, root: Path, options: Options) -> Iterator[float]:
    """Endless training steps from files, with the loss of each."""
    torch.manual_seed(0)
    network = SlotWalker(dino_vits8(), SlotEncoder(num_slots=options.slots, init="learned"), feature_grid=options.grid)
    cache = FeatureCache(root / "features", dtype, batch_size=options.batch) if kept else None
    trainer = SlotTrainer(network, cache=cache).to(options.device)
    data = Flowers(root, "train", transform=Square(8 * options.grid), masks=False)
    loader = build_loader(
        {"dataset": trainer.training_data(data), "batch_size": options.batch, "drop_last": True}, seed=0, training=True
    )
    trainer.train()
    optimizer = torch.optim.Adam([p for p in trainer.parameters() if p.requires_grad], lr=4e-4)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for fetched in loader:
            optimizer.zero_grad()
            total, _ = trainer.parse_losses(trainer.losses(to_device(fetched.data, torch.device(options.device))))
            total.backward()
            optimizer.step()
            yield float(total.detach())


def measure_cache(options: Options) -> dict[str, Any]:
    """Pictures a second of both ways, and the largest relative difference of their losses over the same steps."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_flowers(root, count=4 * options.batch)
        ways = {"pictures": (False, "float32"), "float32": (True, "float32"), "float16": (True, "float16")}
        runs = {name: training(*way, root, options) for name, way in ways.items()}
        losses: dict[str, list[float]] = {name: [] for name in ways}
        passes = {name: partial(_advance, runs[name], losses[name]) for name in ways}
        timed = benchmark(
            passes, device=options.device, repeats=options.rounds, warmup=1, min_time=0.0, threads=options.threads
        )
    steps = min(len(each) for each in losses.values())
    return {
        "pictures_per_second": {name: round(options.batch / timed.time(name).median, 2) for name in ways},
        "times_pictures": {name: round(timed.speedup(name, "pictures").median, 2) for name in ways},
        "rounds": rounds(timed),
        "steps_compared": steps,
        "largest_difference_of_losses": {
            name: max(abs(a / b - 1) for a, b in zip(losses[name], losses["pictures"], strict=False))
            for name in ("float32", "float16")
        },
    }


def _advance(steps: Iterator[float], losses: list[float]) -> None:
    losses.append(next(steps))


def draw_flowers(root: Path, count: int) -> None:
    """Scenes as JPEG files of 256 pixels a side in the layout of Flowers."""
    (root / "jpg").mkdir()
    for number in range(1, count + 1):
        pixels = (255 * draw_scene(number, size=256).image).astype("uint8")
        Image.fromarray(pixels).save(root / "jpg" / f"image_{number:05d}.jpg", quality=95)
    savemat(root / "setid.mat", {"tstid": [list(range(1, count + 1))]})


PARTS = {"loss": measure_loss, "step": measure_step, "cache": measure_cache}


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them as JSON where an output is given."""
    options, _ = parse(argv, Options, doc=__doc__)
    figures = measure(PARTS, options) | {
        "batch": options.batch,
        "tokens": options.grid**2,
        "slots": options.slots,
        **conditions(__file__, argv, options),
    }
    publish(figures, options.output)


if __name__ == "__main__":
    run(main)
