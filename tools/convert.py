"""Weights that the authors published into ours, and ours back; every tensor is accounted for.

  python tools/convert.py paper=stvit src=official.pth dst=weights.safetensors
  python tools/convert.py paper=stvit src=official.pth dst=weights.pt experiment=stvit/deit_small
  python tools/convert.py paper=stvit src=official.pth dst=weights.pt base_depth=4 drop=head.*
  python tools/convert.py paper=stvit src=runs/stvit/digits/latest dst=theirs.pt reverse=true
  python tools/convert.py paper=stvit src=lightning.ckpt dst=weights.pt key=state_dict prefix=model.

Official pickles are read without executing anything: configs and hyper-parameters beside the weights are left aside, a
file that would run code is refused. Nothing is written unless every tensor of the source has a place in the result or a
reason to be dropped, and, with experiment=, the result is exactly what that experiment's network holds (or the part of
its model that into= names). What is written goes into tools/test.py, tools/infer.py and load_from as it is:

  python tools/test.py experiment=stvit/deit_small checkpoint=weights.pt

Everything that is no option below is an option of the paper's converter (its checkpoint.py explains them), or, as
a.b=c, an override of the experiment's config.
"""

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

from core.config.command.cli import run
from core.engine.commands.convert import main

if __name__ == "__main__":
    run(lambda argv: main(argv, __doc__))
