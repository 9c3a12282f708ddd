"""What sampling codes costs, and the decoder's upsampling.

  python benchmarks/seqgan.py [dim=768] [depth=24] [batch=8] [side=16] [device=cpu] [parts=[sampling,upsampling]]

`sampling` draws side x side codes per image with random weights: the autoregressive transformer that keeps keys and
values against one that computes all positions anew at every step, with the same noise (their codes are compared), and
the masked transformer in `steps` steps. `upsampling` measures nearest doubling and convolution in one step against the
two after each other, forward alone and with gradients. All candidates take turns in one process; ratios are medians.

On a CPU, computing anew at full size takes an hour: try dim=256 depth=4 side=8 first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# This file has the name of the package that it measures: look for that in the repository, not beside the file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.cli import parse, run
from core.profile import benchmark, device_name
from seqgan import ARSampler, ARTransformer, MaskedTransformer, ParallelSampler
from seqgan.models import UpsampleConv

CODES, CLASSES = 1024, 1000


@dataclass
class Options:
    """What to measure."""

    dim: int = 768
    depth: int = 24
    heads: int = 16
    batch: int = 8
    side: int = field(default=16, metadata={"help": "codes along a side of an image"})
    steps: int = field(default=12, metadata={"help": "of the masked transformer"})
    channels: int = field(default=128, metadata={"help": "of the map that is doubled"})
    size: int = field(default=64, metadata={"help": "side of the map that is doubled"})
    device: str = "cpu"
    parts: list[str] = field(default_factory=lambda: ["sampling", "upsampling"])
    rounds: int = 3
    threads: int = 1
    output: str | None = None


def measure_sampling(options: Options) -> dict[str, Any]:
    """Seconds per batch of every sampler, and the ratios between them."""
    torch.manual_seed(0)
    sizes = {"length": options.side**2, "dim": options.dim, "depth": options.depth, "num_heads": options.heads}
    ar = ARTransformer(CODES, CLASSES, **sizes).eval().to(options.device)
    nar = MaskedTransformer(CODES, CLASSES, **sizes).eval().to(options.device)
    label = torch.arange(options.batch, device=options.device)
    samplers = {
        "cached": (ARSampler(), ar),
        "anew": (ARSampler(cached=False), ar),
        "parallel": (ParallelSampler(options.steps), nar),
    }
    drawn: dict[str, Tensor] = {}

    def sample(name: str) -> Callable[[], None]:
        sampler, model = samplers[name]

        def once() -> None:
            generator = torch.Generator(options.device).manual_seed(0)
            drawn[name] = sampler(model, label, generator=generator)

        return once

    timed = benchmark(
        {name: sample(name) for name in samplers},
        device=options.device,
        repeats=options.rounds,
        warmup=1,
        threads=options.threads,
    )
    return {
        "seconds": {name: round(timed.time(name).median, 3) for name in samplers},
        "same_codes": torch.equal(drawn["cached"], drawn["anew"]),
        "cached_over_anew": round(timed.speedup("cached", "anew").median, 2),
        "parallel_over_cached": round(timed.speedup("parallel", "cached").median, 2),
    }


def measure_upsampling(options: Options) -> dict[str, Any]:
    """Milliseconds of both ways, and the ratios plain over one step."""
    torch.manual_seed(0)
    up = UpsampleConv(options.channels).to(options.device)
    x = torch.randn(1, options.channels, options.size, options.size, device=options.device)

    def plain(x: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2), up.conv.weight, up.conv.bias, padding=1)

    def forward(way: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(lambda: way(x))

    def trained(way: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: way(x.clone().requires_grad_()).square().sum().backward()

    figures: dict[str, Any] = {"largest_difference": (up(x) - plain(x)).detach().abs().max().item()}
    for name, kind in (("forward", forward), ("with_gradients", trained)):
        ways = {"one_step": kind(up), "plain": kind(plain)}
        timed = benchmark(ways, device=options.device, repeats=options.rounds, threads=options.threads)
        figures[name] = {
            "milliseconds": {way: round(1e3 * timed.time(way).median, 2) for way in ways},
            "speedup": round(timed.speedup("one_step", "plain").median, 2),
        }
    return figures


PARTS = {"sampling": measure_sampling, "upsampling": measure_upsampling}


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them as JSON where an output is given."""
    options, _ = parse(argv, Options, doc=__doc__)
    figures: dict[str, Any] = {name: PARTS[name](options) for name in options.parts}
    figures |= {
        "batch": options.batch,
        "codes": options.side**2,
        "layers": options.depth,
        "channels": options.dim,
        "threads": options.threads,
        "device": device_name(options.device),
        "command": " ".join(["python benchmarks/seqgan.py", *(a for a in argv if not a.startswith("output="))]),
    }
    print(json.dumps(figures, indent=1))
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
