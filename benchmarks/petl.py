"""What tuning costs: a step beside HF peft's, the pass for the scores, a linear probe from features, packed tasks.

  python benchmarks/petl.py [parts=[step,scores,probe,sweep]] [batch=8] [tasks=8] [per_task=2] [rounds=7] [threads=2]
    [device=cpu] [output=results/benchmarks/petl.json]

`step`: a training step (forward, backward, AdamW) of ViT-S/16 at 224 pixels: LoRA of queries and values (r = 8) and TTC
(K = 48) beside peft's LoRA of the packed qkv (r = 8), with the same head and losses; seconds, and the peak of tensors.
`scores`: the importance pass beside one that builds the weights' gradients, too; the scores are compared. `probe`: a
step of a linear classifier on cached features beside one that runs the backbone. `sweep`: a step of ViT-Ti for `tasks`
tasks of `per_task` images, packed and one by one. All candidates take turns in one process; ratios are medians over
rounds.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

# This file has the name of the package that it measures: look for that in the repository, not beside the file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import petl
from core.config.command.cli import parse, run
from core.profile.benchmarking import conditions, measure, publish
from core.profile.measure import Benchmark, benchmark, peak_memory
from petl.models.channels import ScoreSum, channel_products
from petl.models.prefix import FrozenPrefix

CLASSES = 10


@dataclass
class Options:
    """What to measure."""

    parts: list[str] = field(default_factory=lambda: ["step", "scores", "probe", "sweep"])
    batch: int = 8
    tasks: int = field(default=8, metadata={"help": "of the sweep"})
    per_task: int = field(default=2, metadata={"help": "images of each task in a step of the sweep"})
    rounds: int = 7
    threads: int = 2
    device: str = "cpu"
    output: str | None = None


def _network(name: str, options: Options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES).to(options.device)


def _data(options: Options, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(*shape, 3, 224, 224, generator=generator)
    label = torch.randint(CLASSES, shape, generator=generator)
    return image.to(options.device), label.to(options.device)


def _step(model: nn.Module, image: Tensor, label: Tensor) -> Callable[[], float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)

    def once() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return once


def _figures(timed: Benchmark, names: list[str]) -> dict[str, Any]:
    return {
        "milliseconds": {name: round(1e3 * timed.time(name).median, 1) for name in names},
        "rounds": {name: [round(one, 5) for one in each] for name, each in timed.seconds.items()},
    }


def measure_step(options: Options) -> dict[str, Any]:
    """A step of LoRA and of TTC beside peft's LoRA."""
    import peft

    image, label = _data(options, options.batch)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    models = {
        "peft LoRA": peft.get_peft_model(_network("vit_small_patch16_224", options), config),
        "LoRA": petl.inject(_network("vit_small_patch16_224", options), petl.LoRA(8)),
        "TTC": petl.inject(_network("vit_small_patch16_224", options), petl.TTC([list(range(48))] * 12, init="zero")),
    }
    # All begin as the frozen network with the same head: their first losses are equal.
    first = {name: float(nn.functional.cross_entropy(m.eval()(image), label).detach()) for name, m in models.items()}
    assert max(first.values()) - min(first.values()) < 1e-5, first
    steps = {name: _step(model, image, label) for name, model in models.items()}
    peak = {name: peak_memory(once, device=options.device).tensors for name, once in steps.items()}
    timed = benchmark(steps, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
    return {
        **_figures(timed, list(steps)),
        "first_loss": first,
        "megabytes": {name: round(value / 2**20, 1) for name, value in peak.items()},
        "speedup_lora": round(timed.speedup("LoRA", "peft LoRA").median, 3),
        "speedup_ttc": round(timed.speedup("TTC", "peft LoRA").median, 3),
    }


def measure_scores(options: Options) -> dict[str, Any]:
    """The importance pass beside one in which the weights ask for gradients as well."""
    image, label = _data(options, options.batch)
    model = petl.inject(_network("vit_small_patch16_224", options), petl.LNTune())
    plain = petl.inject(copy.deepcopy(_network("vit_small_patch16_224", options)), petl.Full()).eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    kept: dict[str, list[Tensor]] = {}

    def ours() -> None:
        kept["ours"] = petl.channel_scores(model, [(image, label)]).values[""]

    def with_weights() -> None:
        seen: list[Tensor] = []
        hooks = [b.norm2.register_forward_pre_hook(lambda m, a: seen.append(a[0])) for b in plain.backbone.blocks]
        try:
            loss = nn.functional.cross_entropy(plain(image), label, reduction="sum")
            for h in seen:
                h.retain_grad()
            plain.zero_grad()
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        kept["plain"] = []
        for h in seen:
            total = ScoreSum()
            total.add(*channel_products(h, h.grad))
            kept["plain"].append(total.score("abs_of_sum").cpu())

    passes = {"activations alone": ours, "weights' gradients, too": with_weights}
    timed = benchmark(passes, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(kept["ours"], kept["plain"], strict=True))
    assert worst < 1e-4, worst
    return {
        **_figures(timed, list(passes)),
        "largest_relative_difference": worst,
        "speedup": round(timed.speedup("activations alone", "weights' gradients, too").median, 3),
    }


def measure_probe(options: Options) -> dict[str, Any]:
    """Images a second of a linear probe's training step, from features and through the backbone."""
    image, label = _data(options, options.batch)
    model = petl.inject(_network("vit_small_patch16_224", options), petl.Linear(), frozen_mode="eval")
    prefix = FrozenPrefix(model)
    with torch.no_grad():
        features = prefix.features(image)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train(logits: Callable[[], Tensor]) -> Callable[[], None]:
        def once() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(), label).backward()
            optimizer.step()

        return once

    passes = {"features": train(lambda: prefix.logits(features)), "live": train(lambda: model(image))}
    timed = benchmark(passes, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
    rate = {name: round(options.batch / timed.time(name).median, 1) for name in passes}
    return {
        **_figures(timed, list(passes)),
        "images_per_second": rate,
        "speedup": round(timed.speedup("features", "live").median, 1),
    }


def measure_sweep(options: Options) -> dict[str, Any]:
    """A step of several tasks, packed and one after the other."""
    image, label = _data(options, options.tasks, options.per_task)
    base = _network("vit_tiny_patch16_224", options)
    channels = [[torch.randperm(192)[:24].sort().values.tolist() for _ in range(12)] for _ in range(options.tasks)]
    models = [petl.inject(copy.deepcopy(base), petl.TTC(chosen)) for chosen in channels]
    packed = petl.PackedModel(models).train()
    together = torch.optim.AdamW(packed.parameters(), lr=1e-3)
    single = [_step(model, image[t], label[t]) for t, model in enumerate(models)]

    def one_by_one() -> None:
        for once in single:
            once()

    def in_one() -> None:
        together.zero_grad()
        losses = [nn.functional.cross_entropy(one, label[t]) for t, one in enumerate(packed(image))]
        torch.stack(losses).sum().backward()
        together.step()

    passes = {"one by one": one_by_one, "packed": in_one}
    timed = benchmark(passes, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
    return {**_figures(timed, list(passes)), "speedup": round(timed.speedup("packed", "one by one").median, 3)}


PARTS = {"step": measure_step, "scores": measure_scores, "probe": measure_probe, "sweep": measure_sweep}


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them as JSON where an output is given."""
    warnings.filterwarnings("ignore", message="There is a performance drop")
    options, _ = parse(argv, Options, doc=__doc__)
    figures = measure(PARTS, options) | conditions(__file__, argv, options)
    publish(figures, options.output)


if __name__ == "__main__":
    run(main)
