"""What sampling codes costs, training from kept codes, and the decoder's upsampling.

  python benchmarks/seqgan.py [parts=[sampling,parallel,training,upsampling]] [dim=768] [depth=24] [batch=8] [side=16]

`sampling` draws side x side codes of `batch` images with random weights: the autoregressive transformer that keeps keys
and values against one that computes all positions anew at every step. With `anew=exact` both are run; with
`anew=integrated` passes over `lengths` lengths are timed and their sum over all steps is interpolated, which the result
says. With the same noise both draw the same codes, which is checked over the first `prefix` positions (exact: all).
`parallel` times the masked transformer in `steps` steps against the autoregressive one that keeps keys and values, at
each of `batches`; and images of one class, which share the first step, against images of different ones.
`training` times a step (losses, gradients, AdamW) from kept codes against one that runs the frozen tokenizer's encoder
first, at `images` images of 16 `side` pixels.
`upsampling` measures nearest doubling and convolution in one step against the two after each other, forward alone and
with gradients. All candidates take turns in one process; ratios are medians.

At full size on a CPU `sampling anew=exact` takes an hour or more: try dim=256 depth=4 side=8 first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# This file has the name of the package that it measures: look for that in the repository, not beside the file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config.command.cli import parse, run
from core.profile.benchmarking import conditions, measure, publish
from core.profile.measure import Benchmark, benchmark
from seqgan import (
    ARSampler,
    ARTransformer,
    MaskedTransformer,
    ParallelSampler,
    TransformerTrainer,
    conv_tokenizer,
)
from seqgan.models import UpsampleConv

CODES, CLASSES = 1024, 1000


@dataclass
class Options:
    """What to measure."""

    dim: int = 768
    depth: int = 24
    heads: int = 16
    batch: int = field(default=8, metadata={"help": "images of `sampling`"})
    batches: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "images of `parallel`"})
    images: int = field(default=2, metadata={"help": "images of `training`"})
    filters: int = field(default=128, metadata={"help": "width of the tokenizer of `training`"})
    anew: Literal["exact", "integrated"] = field(default="integrated", metadata={"help": "how it is measured"})
    lengths: int = field(default=9, metadata={"help": "that are timed with anew=integrated"})
    prefix: int = field(default=16, metadata={"help": "positions whose codes are compared with anew=integrated"})
    side: int = field(default=16, metadata={"help": "codes along a side of an image"})
    steps: int = field(default=12, metadata={"help": "of the masked transformer"})
    channels: int = field(default=128, metadata={"help": "of the map that is doubled"})
    size: int = field(default=64, metadata={"help": "side of the map that is doubled"})
    device: str = "cpu"
    parts: list[str] = field(default_factory=lambda: ["sampling", "parallel", "training", "upsampling"])
    rounds: int = 3
    threads: int = 1
    output: str | None = None


def transformers(options: Options) -> tuple[ARTransformer, MaskedTransformer]:
    """Both kinds with random weights."""
    torch.manual_seed(0)
    sizes = {"length": options.side**2, "dim": options.dim, "depth": options.depth, "num_heads": options.heads}
    return (
        ARTransformer(CODES, CLASSES, **sizes).eval().to(options.device),
        MaskedTransformer(CODES, CLASSES, **sizes).eval().to(options.device),
    )


def timed(ways: dict[str, Callable[[], Any]], options: Options, warmup: int = 1) -> Any:
    """All ways in turn."""
    return benchmark(ways, device=options.device, repeats=options.rounds, warmup=warmup, threads=options.threads)


def seconds(found: Any, ways: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Median of each way, and every round of each: rounds with one index were taken close together."""
    return {
        "seconds": {name: round(found.time(name).median, 5) for name in ways},
        "rounds": {name: [round(one, 5) for one in found.seconds[name]] for name in ways},
    }


def sampling(sampler: Any, model: Any, label: Tensor, kept: dict[str, Tensor], name: str) -> Callable[[], None]:
    """Draws codes of these classes with noise of seed 0, and keeps them under a name."""

    def once() -> None:
        kept[name] = sampler(model, label, generator=torch.Generator(label.device).manual_seed(0))

    return once


def measure_sampling(options: Options) -> dict[str, Any]:
    """Seconds of a batch with kept keys and values and anew, and their ratio."""
    ar, _ = transformers(options)
    label = torch.arange(options.batch, device=options.device)
    drawn: dict[str, Tensor] = {}
    ways = {
        "cached": sampling(ARSampler(), ar, label, drawn, "cached"),
        "anew": sampling(ARSampler(cached=False), ar, label, drawn, "anew"),
    }
    if options.anew == "exact":
        found = timed(ways, options)
        figures: dict[str, Any] = {
            **seconds(found, ways),
            "cached_over_anew": round(found.speedup("cached", "anew").median, 2),
            "anew": "run",
        }
        compared = ar.length
    else:
        lengths = sorted({round(x) for x in torch.linspace(1, ar.length, options.lengths).tolist()})
        tokens = torch.zeros(options.batch, ar.length, dtype=torch.long, device=options.device)

        def passes(length: int) -> Callable[[], Tensor]:
            return torch.no_grad()(lambda: ar.token_logits(tokens[:, :length]))

        whole = timed({"cached": ways["cached"]}, options)
        single = timed({str(length): passes(length) for length in lengths}, options)
        rounds = zip(*(single.seconds[str(length)] for length in lengths), strict=True)
        anew = [float(np.interp(range(1, ar.length + 1), lengths, points).sum()) for points in rounds]
        found = Benchmark({"cached": whole.seconds["cached"], "anew": tuple(anew)})
        figures = {
            **seconds(found, ways),
            "cached_over_anew": round(found.speedup("cached", "anew").median, 2),
            "anew": f"integrated over passes of {len(lengths)} lengths, {lengths[0]} to {lengths[-1]}; not run",
        }
        compared = ar.length = min(options.prefix, ar.length)  # samplers stop at the model's length
        for way in ways.values():
            way()
    return {**figures, "same_codes": torch.equal(drawn["cached"], drawn["anew"]), "compared_positions": compared}


def measure_parallel(options: Options) -> dict[str, Any]:
    """Seconds of both transformers at every size of batch, and of images of one class and of several."""
    ar, nar = transformers(options)
    drawn: dict[str, Tensor] = {}
    figures: dict[str, Any] = {}
    for batch in options.batches:
        label = torch.arange(batch, device=options.device)
        ways = {
            "cached": sampling(ARSampler(), ar, label, drawn, "cached"),
            "parallel": sampling(ParallelSampler(options.steps), nar, label, drawn, "parallel"),
        }
        if batch > 1:
            one = ParallelSampler(options.steps)
            ways["parallel_of_one_class"] = sampling(one, nar, torch.zeros_like(label), drawn, "one")
        found = timed(ways, options)
        figures[f"batch {batch}"] = {
            **seconds(found, ways),
            "parallel_over_cached": round(found.speedup("parallel", "cached").median, 2),
        }
        if batch > 1:
            ratio = found.speedup("parallel_of_one_class", "parallel").median
            figures[f"batch {batch}"]["one_class_over_several"] = round(ratio, 3)
    return figures


def measure_training(options: Options) -> dict[str, Any]:
    """Seconds of a step of each transformer from kept codes and with the encoder, and the ratios."""
    torch.manual_seed(0)
    tokenizer = conv_tokenizer(options.filters, codebook_size=CODES).to(options.device)
    side = 16 * options.side
    image = torch.rand(options.images, 3, side, side, device=options.device) * 2 - 1
    label = torch.arange(options.images, device=options.device)
    codes = tokenizer.encode(image)
    figures: dict[str, Any] = {"images": options.images, "pixels": side}
    for name, network in zip(("autoregressive", "masked"), transformers(options), strict=True):
        trainer = TransformerTrainer(network, tokenizer)
        trainer.freeze()
        trainer.train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

        def step(batch: dict[str, Tensor], trainer: Any = trainer, optimizer: Any = optimizer) -> Callable[[], None]:
            def once() -> None:
                optimizer.zero_grad()
                trainer.losses(batch)["loss_codes"].backward()
                optimizer.step()

            return once

        ways = {
            "kept_codes": step({"codes": codes, "label": label}),
            "with_encoder": step({"image": image, "label": label}),
            "encoder_alone": lambda: tokenizer.encode(image),
        }
        found = timed(ways, options)
        figures[name] = {
            **seconds(found, ways),
            "kept_over_encoder": round(found.speedup("kept_codes", "with_encoder").median, 2),
        }
    return figures


def measure_upsampling(options: Options) -> dict[str, Any]:
    """Seconds of both ways, and the ratios plain over one step."""
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
        found = timed(ways, options, warmup=3)
        figures[name] = {
            **seconds(found, ways),
            "speedup": round(found.speedup("one_step", "plain").median, 2),
        }
    return figures


PARTS = {
    "sampling": measure_sampling,
    "parallel": measure_parallel,
    "training": measure_training,
    "upsampling": measure_upsampling,
}


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them as JSON where an output is given."""
    options, _ = parse(argv, Options, doc=__doc__)
    figures = measure(PARTS, options) | {
        "batch": options.batch,
        "codes": options.side**2,
        "layers": options.depth,
        "channels": options.dim,
        **conditions(__file__, argv, options),
    }
    publish(figures, options.output)


if __name__ == "__main__":
    run(main)
