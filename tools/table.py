"""A paper's tables with our figures beside the paper's, and the claims that the stand-ins decide.

  python tools/table.py                                          all tables of all papers
  python tools/table.py stvit/imagenet_deit                      paper and ours; data-free figures computed on the spot
  python tools/table.py stvit/imagenet_deit format=md output=table.md
  python tools/table.py stvit/imagenet_deit run=true seeds=3 runtime=bf16_compiled   train what is missing
  python tools/table.py stvit/imagenet_deit measure=true         measure throughput and memory columns here
  python tools/table.py stvit/claim run=true                     train the claim's rows, judge, store results/claims/
  python tools/table.py stvit/claim run=true only='random tokens'
  python tools/table.py claims                                   every paper's claims as last stored

Figures of runs come from the result.json files below runs_dir whose config is the row's; a run copied from a cluster
counts. What nobody knows stays an empty cell. Marks on the paper's figures say where they were read.
Everything that is no option below is a Hydra override, added to every row's.
"""

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

from core.config.command.cli import run
from core.tables.table import main

if __name__ == "__main__":
    run(lambda argv: main(argv, __doc__))
