"""What walks cost: the loss over blocks of rows against the plain one, cached features against live, and decoders.

  python benchmarks/slot_walks.py [batch=4] [grid=14] [slots=7] [device=cpu] [parts=[loss,step]] [rounds=7]

`loss` measures forward and backward of the P-W-P and W-P-W walks alone: seconds, and the peak of tensors alive. `step`
measures a training step (backbone, slots, signal, backward; no optimizer) of DINO ViT-S/8 with random weights: walks on
pictures, walks on cached features, and the decoders on cached features. All candidates take turns in one process;
ratios are medians over rounds.

The paper's memory at evaluation size: batch=32 grid=40 parts=[loss].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# This file has the name of the package that it measures: look for that in the repository, not beside the file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.cli import parse, run
from core.profile import benchmark, device_name, peak_memory
from slot_walks import SlotEncoder, SlotTrainer, SlotWalker, WalkLoss, dino_vits8

CHANNELS = 384


@dataclass
class Options:
    """What to measure."""

    batch: int = 4
    grid: int = field(default=14, metadata={"help": "patches along a side: 28 for 224 pixels, 40 for 320"})
    slots: int = 7
    device: str = "cpu"
    parts: list[str] = field(default_factory=lambda: ["loss", "step"])
    rounds: int = 7
    threads: int = 1
    output: str | None = None


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
    }


PARTS = {"loss": measure_loss, "step": measure_step}


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them as JSON where an output is given."""
    options, _ = parse(argv, Options, doc=__doc__)
    figures: dict[str, Any] = {name: PARTS[name](options) for name in options.parts}
    figures |= {
        "batch": options.batch,
        "tokens": options.grid**2,
        "slots": options.slots,
        "threads": options.threads,
        "device": device_name(options.device),
        "command": " ".join(["python benchmarks/slot_walks.py", *argv]),
    }
    print(json.dumps(figures, indent=1))
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
