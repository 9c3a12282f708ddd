"""Evaluates a checkpoint on its experiment's test split.

  python tools/test.py experiment=stvit/digits checkpoint=runs/stvit/digits/2026-01-31_12-00-00
  python tools/test.py experiment=stvit/digits checkpoint=weights.pt split=val test_dataloader.batch_size=64
  torchrun --nproc-per-node 8 tools/test.py experiment=... checkpoint=...    no sample is counted twice

`checkpoint` is a run's folder (its newest whole checkpoint, or best=true), a checkpoint, or a file of weights, e.g. one
that tools/convert.py wrote. Everything else is an override of the experiment's config.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from core.cli import parse, run


@dataclass
class Options:
    """What to evaluate."""

    checkpoint: str = field(metadata={"help": "run folder, checkpoint or weights file"})
    split: str = field(default="test", metadata={"help": "test or val"})
    best: bool = field(default=False, metadata={"help": "of a run's folder, the best checkpoint instead of the newest"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs of your own"})
    output: str | None = field(default=None, metadata={"help": "also write the metrics to this JSON file"})


def main(argv: list[str]) -> None:
    """Prints the metrics as JSON."""
    options, overrides = parse(argv, Options, doc=__doc__, overrides=True)
    from core.config import compose
    from core.evaluation import evaluate
    from core.run_folder import find_checkpoint

    cfg = compose(overrides, options.config_dir)
    metrics = evaluate(cfg, find_checkpoint(options.checkpoint, best=options.best), split=options.split)
    text = json.dumps(metrics, indent=1, default=float)
    print(text)
    if options.output:
        from pathlib import Path

        Path(options.output).write_text(text + "\n")


if __name__ == "__main__":
    run(main)
