"""Runs a trained model on your own files, and shows why it says what it says.

  python tools/infer.py checkpoint=runs/stvit/digits/latest input=a.png output=out
  python tools/infer.py checkpoint=RUN input=folder output=out best=true
  python tools/infer.py experiment=stvit/digits checkpoint=weights.pt input=folder output=out

`input` is a file or a folder (images and videos below it). For every file `output` gets pictures (PNG, GIF) that
explain the result, and `results.json` holds one record per file. Models that generate need no input: what they make is
written as `samples_*`. A file that cannot be processed has the reason in its record and does not stop the others; how
many there were is said at the end, and the exit status is 2 when nothing could be processed.

`checkpoint` and the options about it are those of tools/test.py, whose --help explains them. Every other key=value is
an override of the config.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

from core.config.command.cli import parse, run
from core.engine.run.options import InferOptions as Options


def main(argv: list[str]) -> None:
    """Writes pictures and records."""
    options, overrides = parse(argv, Options, doc=__doc__, overrides=True)
    from core.engine.commands.inference import infer

    infer(overrides, options)


if __name__ == "__main__":
    run(main)
