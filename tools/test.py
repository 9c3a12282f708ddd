"""Evaluates a checkpoint on its experiment's test split.

  python tools/test.py checkpoint=runs/stvit/digits/latest              the newest run, with its config
  python tools/test.py checkpoint=RUN best=true split=val
  python tools/test.py checkpoint=RUN test_dataloader.batch_size=64     an override of that config
  python tools/test.py checkpoint=RUN/stage_0_tokenizer                 a stage that is not the last
  python tools/test.py experiment=stvit/digits checkpoint=latest        the same as the first line
  python tools/test.py experiment=stvit/digits checkpoint=weights.pt    a file needs an experiment
  torchrun --nproc-per-node 8 tools/test.py checkpoint=RUN              no sample is counted twice

`checkpoint` is a run's folder (its newest whole checkpoint, or best=true), a checkpoint in one, or
a file of weights: .pt, .pth, .safetensors or .npz, such as tools/convert.py writes. Weights of the
network alone find their place by their names and shapes; where several places fit, into= chooses.
into, prefix, strict, ignore, key, averaged and finite mean the same in a config's load_from={path:
FILE, into: ..., ...}, which also gives what a file of a part lacks.

Named beside a run, experiment= is built in place of the run's own config, and what then differs in
the model is said. Every other key=value is an override of the config. The metrics go to standard
output, as JSON, the rest to standard error.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

import json

from core.config.command.cli import parse, run
from core.engine.run.options import EvaluationOptions as Options


def main(argv: list[str]) -> None:
    """Prints the metrics as JSON, on the first process."""
    options, overrides = parse(argv, Options, doc=__doc__, overrides=True)
    from core.checkpoint import write_text_atomic
    from core.config.command.messages import first_process, to_stderr
    from core.engine.commands.evaluation import evaluate

    with to_stderr():
        cfg, file = options.configured(overrides)
        metrics = evaluate(cfg, file, options.split, options.load())
    if not first_process():
        return
    text = json.dumps(metrics, indent=1, default=float)
    print(text)
    if options.output:
        write_text_atomic(text + "\n", options.output)


if __name__ == "__main__":
    run(main)
