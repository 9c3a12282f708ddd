"""Suggests a learning rate: one short sweep over growing rates, with a picture of the losses.

  python tools/find_lr.py experiment=stvit/digits                                from 1e-7 to 1 in 100 updates
  python tools/find_lr.py experiment=stvit/digits min=1e-5 max=0.1 steps=200 train_dataloader.batch_size=64
  python tools/find_lr.py experiment=seqgan/shape_glyphs stage=tokenizer loss=loss_l1
  python tools/find_lr.py experiment=... part=discriminator                      one of several optimizers
  torchrun --nproc-per-node 8 tools/find_lr.py experiment=...                    with the whole batch

The suggestion is where the smoothed loss falls steepest; a rate between that and the lowest loss is usual. A loss that
runs away ends the sweep. Groups of parameters keep their factors, other optimizers their rates; precision,
accumulation and clipping are those of the experiment; schedules are left out. lr.png and lr.json lie in
runs_dir/lr/EXPERIMENT/TIME; no weights are kept. Everything that is no option below is an override of the experiment.
"""

from core.config.command.cli import run
from core.engine.commands.lr_finder import main

if __name__ == "__main__":
    run(lambda argv: main(argv, __doc__))
