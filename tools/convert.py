"""Weights that the authors published into ours, and ours back; every tensor is accounted for.

  python tools/convert.py paper=stvit src=official.pth dst=weights.safetensors
  python tools/convert.py paper=stvit src=official.pth dst=weights.safetensors experiment=stvit/deit_small
  python tools/convert.py paper=stvit src=official.pth dst=weights.pt base_depth=4 drop=head.*
  python tools/convert.py paper=stvit src=runs/stvit/digits/2026-01-31_12-00-00 dst=theirs.pt reverse=true
  python tools/convert.py paper=stvit src=lightning.ckpt dst=weights.pt key=state_dict prefix=model.

Official pickles are read without executing anything: configs and hyper-parameters beside the weights are left aside, a
file that would run code is refused. Nothing is written unless every tensor of the source has a place in the result or a
reason to be dropped, and, with experiment=, the result is exactly what that experiment's model holds. tools/test.py,
tools/infer.py and load_from= read what is written.

Everything that is no option below is an option of the paper's converter (its checkpoint.py explains them), or, as
a.b=c, an override of the experiment's config.
"""

from core.cli import run
from core.convert import main

if __name__ == "__main__":
    run(lambda argv: main(argv, __doc__))
