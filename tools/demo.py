"""A first look at a paper: its idea beside its baseline in a few minutes, as a table and images.

  make demo                                 sets up where needed, then shows stvit: five minutes on two cores
  make demo PAPER=slot_walks                another paper
  python tools/demo.py paper=slot_walks     the same without set-up
  python tools/demo.py seed=1 output=out    another start, another folder
  python tools/demo.py paper=seqgan quick=true       whether it runs, in seconds

What is trained, which columns and images are shown and what to try next stands in PAPER/tables/demo.yaml; the pieces
are those of `tools/train.py` and `tools/table.py`. A demo that was stopped goes on where it was, one that has ended
shows its figures again. Everything that is no option below is a Hydra override of every row.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

from core.config.command.cli import run
from core.tables.demo import main

if __name__ == "__main__":
    run(lambda argv: main(argv, __doc__))
