"""The first look: trains a small STViT and the full ViT of the same size on real digits, and sets them side by side.

  make demo                                 sets up where needed, then does this: under five minutes on two cores
  python tools/demo.py                      the same without set-up
  python tools/demo.py epochs=1             shorter and worse
  python tools/demo.py seed=1 output=out    another start, another folder

Prints accuracy on test digits, multiply-accumulates and throughput with their ratios, and writes a picture of what each
semantic token attends to. The pieces are the public tools': `tools/train.py experiment=stvit/digits` and
`experiment=stvit/digits_full` train the same two models, `tools/profile.py experiment=... vs=...` compares further,
`tools/table.py stvit/digits run=true seeds=3` does it over three seeds.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.command.cli import parse, run


@dataclass
class Options:
    """What to train and where to put it."""

    ours: str = field(default="stvit/digits", metadata={"help": "experiment with semantic tokens"})
    baseline: str = field(default="stvit/digits_full", metadata={"help": "experiment to compare with"})
    output: str = field(default="runs/demo", metadata={"help": "folder of runs, picture and figures"})
    seed: int = field(default=0, metadata={"help": "of both trainings"})
    epochs: int | None = field(default=None, metadata={"help": "of both trainings; null: what the experiments say"})
    threads: int = field(default=2, metadata={"help": "CPU threads"})


def main(argv: list[str]) -> None:
    """Trains both, prints the table, writes the picture."""
    options, _ = parse(argv, Options, doc=__doc__)
    from core.config import compose
    from core.engine.launch import build_trainer
    from core.engine.launch import run as train
    from core.output.render import emit

    output = Path(options.output)
    words = [f"runs_dir={output}", f"seed={options.seed}", "runtime=cpu", f"runtime.threads={options.threads}"]
    if options.epochs is not None:
        words.append(f"train_cfg.max_epochs={options.epochs}")
    configs = {name: compose([f"experiment={name}", *words]) for name in (options.ours, options.baseline)}
    results = {}
    for step, (name, cfg) in enumerate(configs.items(), start=1):
        print(f"[{step}/3] training {name}", flush=True)
        results[name] = train(cfg)
    print("[3/3] measuring throughput, the two in turn", flush=True)
    table = side_by_side(configs, results, options, build_trainer)
    print()
    emit(table)
    emit(table, "json", output / "figures.json", quiet=True)
    pictures = sorted((Path(results[options.ours]["run_dir"]) / "media").glob("*tokens_*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], output / "tokens.png")
        print(f"\nWhat each semantic token attends to: {output / 'tokens.png'}")


def side_by_side(configs: dict[str, Any], results: dict[str, Any], options: Options, build_trainer: Any) -> Any:
    """The table: both models, and ours over the baseline."""
    from core.output.render import Cell, Column, Row, Table
    from core.profile.figures import Figures, MeasureSettings, measure

    settings = MeasureSettings(batch=100, repeats=9, threads=options.threads, device="cpu")
    speed = measure(configs, ["throughput"], settings, build_trainer)["throughput"]
    figures = Figures(build_trainer)
    ours, baseline = options.ours, options.baseline

    def known(name: str, figure: str) -> float:
        return float(figures.of(configs[name], figure))

    rows = [
        Row(
            {
                "model": name,
                "tokens": int(known(name, "tokens")),
                "parameters": known(name, "parameters") / 1e6,
                "top1": 100 * results[name]["metrics"]["top1"],
                "macs": known(name, "macs") / 1e6,
                "throughput": Cell(speed[name].median, spread=(speed[name].high - speed[name].low) / 2),
                "seconds": results[name]["seconds"],
            }
        )
        for name in (baseline, ours)
    ]
    rounds = sorted(a / b for a, b in zip(speed[ours].rounds, speed[baseline].rounds, strict=True))
    difference = 100 * (results[ours]["metrics"]["top1"] - results[baseline]["metrics"]["top1"])
    rows.append(
        Row(
            {
                "model": "ratio (accuracy: difference)",
                "tokens": f"x {known(ours, 'tokens') / known(baseline, 'tokens'):.2f}",
                "parameters": f"x {known(ours, 'parameters') / known(baseline, 'parameters'):.2f}",
                "top1": f"{difference:+.1f}",
                "macs": f"x {known(ours, 'macs') / known(baseline, 'macs'):.2f}",
                "throughput": f"x {rounds[len(rounds) // 2]:.2f}",
                "seconds": f"x {results[ours]['seconds'] / results[baseline]['seconds']:.2f}",
            }
        )
    )
    columns = [
        Column("model", " ", align="left"),
        Column("tokens"),
        Column("parameters", unit="M", digits=3),
        Column("top1", "test accuracy", unit="%", better="higher", digits=1),
        Column("macs", "MACs", unit="M", better="lower", digits=1),
        Column("throughput", unit="images/s", better="higher", digits=0),
        Column("seconds", "training", unit="s", better="lower", digits=0),
    ]
    notes = [
        f"Seed {options.seed}; images are 28 x 28. Throughput: batch {settings.batch}, {options.threads} CPU threads, "
        f"median of {settings.repeats} rounds in which the two take turns; its ratio is that of the rounds.",
    ]
    return Table("STViT and the full ViT on real digits", columns, rows, notes)


if __name__ == "__main__":
    run(main)
