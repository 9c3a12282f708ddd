"""Switches an experiment's components one at a time and says what each is worth.

  python tools/ablate.py experiment=stvit/digits dry_run=true            the runs, done and to do
  python tools/ablate.py experiment=stvit/digits                         all declared components, three seeds
  python tools/ablate.py experiment=stvit/digits components=semantic_init,base_depth seeds=5
  python tools/ablate.py experiment=stvit/digits metric=top1 train_cfg.max_epochs=2 runtime=cpu
  python tools/ablate.py experiment=stvit/digits format=md output=ablation.md

Runs go one after the other; finished ones (same resolved config, same seed) are not repeated, and an interrupted one
goes on where it stopped. Table and plot are kept in runs_dir/ablations/EXPERIMENT/.
Everything that is no option below is a Hydra override, for the base and every change.
"""

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

from core.config.command.cli import run
from core.tables.ablation import main

if __name__ == "__main__":
    run(lambda argv: main(argv, __doc__))
