"""Runs a trained model on your own files, and shows why it says what it says.

  python tools/infer.py experiment=stvit/digits checkpoint=runs/stvit/digits/2026-01-31_12-00-00 input=a.png output=out
  python tools/infer.py experiment=stvit/digits checkpoint=weights.pt input=folder output=out

`input` is a file or a folder (images and videos below it). For every file `output` gets pictures (PNG, GIF) that
explain the result, and `results.json` holds one record per file. Models that generate need no input: what they make is
written as `samples_*`. Everything else is an override of the experiment's config.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.cli import parse, run


@dataclass
class Options:
    """What to look at."""

    checkpoint: str = field(metadata={"help": "run folder, checkpoint or weights file"})
    output: str = field(metadata={"help": "folder for pictures and results.json"})
    input: str | None = field(default=None, metadata={"help": "a file, or a folder of files; null: nothing is needed"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs of your own"})


def main(argv: list[str]) -> None:
    """Writes pictures and records."""
    options, overrides = parse(argv, Options, doc=__doc__, overrides=True)
    from core.inference import infer

    infer(overrides, options)


if __name__ == "__main__":
    run(main)
