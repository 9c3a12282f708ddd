"""What an experiment costs: parameters, multiply-accumulates, time, memory, loader, and where the time goes.

  python tools/profile.py experiment=stvit/deit_small
  python tools/profile.py experiment=stvit/deit_small vs=stvit/deit_small_full batch=64 what=macs,forward
  python tools/profile.py experiment=stvit/digits vs='stvit/digits model.network.token_grid=3' what=macs,forward
  python tools/profile.py experiment=stvit/digits what=forward,train threads=1 repeats=30
  python tools/profile.py experiment=stvit/digits model.network.token_grid=3 what=macs format=json
  python tools/profile.py experiment=stvit/deit_small device=cuda batch=128 runtime.precision=bf16 what=forward,memory

Everything that is no option below is a Hydra override, as in tools/train.py (for both experiments, with vs=; what
stands inside vs='...' is for the second alone).

  macs      parameters and multiply-accumulates (1 MAC = 2 FLOPs), attention products included, on the meta device
  forward   one pass in evaluation mode, at batch 1 and at batch=
  train     one training step (forward, backward, update) on a made-up batch
  memory    peak of both
  loader    samples per second of the training loader, on the real data
  ops       the dearest operators and modules of a training step

Timings are medians with quartiles over `repeats` rounds. With vs= the two experiments take turns inside every round,
and the ratio is that of the rounds: a machine that slows down meanwhile slows both.
"""

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

import sys

if __name__ == "__main__":
    from core.config.command.cli import run
    from core.profile.experiment import main

    run(lambda argv: main(argv, __doc__))
else:
    # The sibling tools have this folder first on their path, and Python's cProfile (which torch.compile imports) asks
    # for the standard library's module of this name: hand that over instead.
    import importlib.util
    import sysconfig
    from pathlib import Path

    _spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib")) / "profile.py")
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
