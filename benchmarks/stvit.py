"""Semantic tokens against the models they thin out: throughput and peak memory, side by side in one process.

  python benchmarks/stvit.py [only=deit_small] [batch=32] [rounds=7] [threads=2] [output=results/benchmarks/stvit.json]
  python benchmarks/stvit.py device=cuda batch=128 dtype=bfloat16 compile=true output=results/benchmarks/stvit_gpu.json

Baselines are timm's own models, as a user gets them; for the dense backbone also ours with keys and values projected
for every window, as the release does. Candidates take turns, and the ratio of every round is kept, so that a slow spell
of the machine hits both. Weights are random: they do not change the time. Convolutions and their batch norms are not
fused, and nothing is compiled unless `compile=true`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

# This file has the name of the package that it measures: look for that in the repository, not beside the file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stvit
from core.config.command.cli import parse, run
from core.profile.benchmarking import conditions, publish
from core.profile.measure import benchmark, count_macs, peak_memory


@dataclass(frozen=True)
class Pair:
    """What is compared, on images of one size; `batch` None is the option's."""

    ours: Callable[[], nn.Module]
    baselines: Mapping[str, Callable[[], nn.Module]]
    size: tuple[int, int] = (224, 224)
    batch: int | None = None


def classifiers(ours: str, baseline: str) -> Pair:
    """Two of timm's names at 224 x 224."""
    return Pair(lambda: timm.create_model(ours), {baseline: lambda: timm.create_model(baseline)})


def backbones(arch: str) -> Pair:
    """Four maps of an image of 800 x 1280, as a detector takes them."""
    size, swin = (800, 1280), f"swin_{arch}_patch4_window7_224"

    def recovery(**options: Any) -> nn.Module:
        return stvit.STViTRSwin(arch=arch, features_only=True, num_classes=0, **options)

    return Pair(
        recovery,
        {
            swin: lambda: timm.create_model(swin, features_only=True, img_size=size, window_size=7),
            "projected per window": lambda: recovery(attn_impl="per_window"),
        },
        size,
        batch=1,
    )


DEIT = ("tiny", "small", "base")
PAIRS: dict[str, Pair] = {
    **{f"deit_{s}": classifiers(f"stvit_deit_{s}_patch16_224", f"deit_{s}_patch16_224") for s in DEIT},
    "swin_tiny": classifiers("stvit_swin_tiny_window7_224", "swin_tiny_patch4_window7_224"),
    "r_swin_small": classifiers("stvit_r_swin_small_window7_224", "swin_small_patch4_window7_224"),
    "dense_small": backbones("small"),
}


@dataclass
class Options:
    """How to measure."""

    only: str | None = None
    batch: int = 32
    rounds: int = 7
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    memory: bool = True
    output: str | None = "results/benchmarks/stvit.json"


def compare(pair: Pair, options: Options) -> dict[str, Any]:
    """Images per second, MACs and peak memory of each, and the ratios of our throughput."""
    batch, dtype = pair.batch or options.batch, getattr(torch, options.dtype)
    images = torch.randn(batch, 3, *pair.size, device=options.device, dtype=dtype)
    models = {"ours": pair.ours} | dict(pair.baselines)
    models = {name: build().eval().to(options.device, dtype) for name, build in models.items()}
    macs = {name: count_macs(model, (images[:1],)).total for name, model in models.items()}
    if options.compile:
        models = {name: torch.compile(model, fullgraph=name == "ours") for name, model in models.items()}
    calls = {name: lambda model=model: model(images) for name, model in models.items()}
    with torch.inference_mode():
        times = benchmark(calls, device=options.device, repeats=options.rounds, warmup=2, threads=options.threads)
        peaks = (
            {name: peak_memory(call, device=options.device) for name, call in calls.items()} if options.memory else {}
        )
    return {
        "size": list(pair.size),
        "batch": batch,
        "models": {
            name: {
                "images_per_second": round(times.rate(name, batch).median, 3),
                "gmacs": round(macs[name] / 1e9, 3),
                **({"peak_mib": round(peaks[name].tensors / 2**20, 1)} if peaks else {}),
            }
            for name in models
        },
        "speedup": {
            name: {
                "median": round(times.speedup("ours", over=name).median, 3),
                "rounds": [round(ratio, 3) for ratio in times.speedups("ours", over=name)],
            }
            for name in pair.baselines
        },
    }


def main(argv: list[str]) -> None:
    """Prints the figures and writes them as JSON; with `only`, other results in the file stay."""
    options, _ = parse(argv, Options, doc=__doc__)
    if options.only not in (None, *PAIRS):
        raise SystemExit(f"only={options.only} is none of {', '.join(PAIRS)}")
    path = Path(options.output) if options.output else None
    figures = json.loads(path.read_text()) if path and path.exists() else {}
    for name in [options.only] if options.only else PAIRS:
        figures[name] = compare(PAIRS[name], options) | {
            "dtype": options.dtype,
            "compile": options.compile,
            **conditions(__file__, argv, options),
        }
        publish(figures, options.output, shown={name: figures[name]})


if __name__ == "__main__":
    run(main)
