"""Checks on a GPU what no other machine can: python -m tests.cuda

  python -m tests.cuda                                     everything, in a few minutes; writes results/cuda.json
  python -m tests.cuda experiments=stvit/glyphs checks=agreement,bf16
  python -m tests.cuda device=cpu                          what has a meaning on a CPU: that the checks themselves run

Every training step that the papers have is tried on a small experiment, found in the configs:

  agreement       CPU against GPU in float32: every loss term, also behind an update
  fp32 bf16 fp16  steps in a precision: finite, near float32's; time and peak memory
  compile         torch.compile of the networks: the losses of the plain step
  channels_last   the other memory format of images: the same losses
  ddp             DistributedDataParallel with NCCL on one device: the same losses

and the engine on a tiny one:

  prefetch        the copy of the next batch is hidden behind the step
  waiting         nothing in a step waits for the GPU, the watch over losses and gradients included
  resume          a run that goes on from a checkpoint ends with the same weights bit for bit
  torchrun        tools/train.py under torchrun with one process

The exit status is 0 when everything holds, 1 when something does not, and 3 where there is no GPU: nothing was checked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from core.config.command.cli import parse, run

CHECKS = (
    "agreement",
    "fp32",
    "bf16",
    "fp16",
    "compile",
    "channels_last",
    "ddp",
    "prefetch",
    "waiting",
    "resume",
    "torchrun",
)


@dataclass
class Options:
    """What is checked, and where."""

    device: str = field(default="cuda", metadata={"help": "cuda, or cpu to see that the checks themselves run"})
    checks: list[str] = field(default_factory=lambda: list(CHECKS), metadata={"help": "any of " + ", ".join(CHECKS)})
    experiments: list[str] | None = field(default=None, metadata={"help": "experiments to look at; null: all"})
    largest: float = field(default=60.0, metadata={"help": "millions of parameters above which a step is left out"})
    output: str | None = field(
        default=None, metadata={"help": "JSON file of the report; null: results/cuda.json, and nothing on a CPU"}
    )


@dataclass
class Outcome:
    """What a check of a subject gave: holds, fails, or has no meaning there."""

    check: str
    subject: str
    verdict: str
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def main(argv: list[str]) -> None:
    """The command line."""
    options, _ = parse(argv, Options, doc=__doc__)
    from core.errors import ConfigError, nearest

    for name in options.checks:
        if name not in CHECKS:
            raise ConfigError(f"checks={name}{nearest(name, CHECKS)} (there are: {', '.join(CHECKS)})")
    if options.device not in ("cuda", "cpu"):
        raise ConfigError(f"device={options.device}: cuda or cpu")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked (device=cpu runs what has a meaning on a CPU)")
        raise SystemExit(3)
    logging.disable(logging.INFO)  # what runs and builders say of themselves
    outcomes, left_out = [], []
    with tempfile.TemporaryDirectory() as folder:
        for item in checked(options, torch.device(options.device), Path(folder)):
            if isinstance(item, str):
                left_out.append(item)
                print(item, file=sys.stderr, flush=True)
            else:
                outcomes.append(item)
                print(f"{item.verdict:<6} {item.check} {item.subject}  {item.reason}".rstrip(), flush=True)
    report(options, outcomes, left_out)
    if any(outcome.verdict == "fails" for outcome in outcomes):
        raise SystemExit(1)


def checked(options: Options, device: Any, folder: Path) -> Iterator[Outcome | str]:
    """Every outcome as it comes, and lines about what is left out."""
    from . import engine, steps
    from .subjects import choose

    of_steps: dict[str, Callable[..., Any]] = {
        "agreement": steps.agreement,
        **{name: partial(steps.precision, name=name) for name in ("fp32", "bf16", "fp16")},
        "compile": steps.compiled,
        "channels_last": steps.channels_last,
        "ddp": steps.data_parallel,
    }
    if any(name in of_steps for name in options.checks):
        subjects, left_out = choose(options.experiments, options.largest, folder)
        yield from left_out
        for subject in subjects:
            for name in (name for name in options.checks if name in of_steps):
                yield outcome(name, subject.name, partial(of_steps[name], subject, device))
    lab = engine.Lab(folder / "lab", device)
    of_engine = {
        "prefetch": partial(engine.prefetch, device),
        "waiting": partial(engine.no_waiting, lab),
        "resume": partial(engine.resume, lab),
        "torchrun": partial(engine.torchrun, lab),
    }
    for name in (name for name in options.checks if name in of_engine):
        yield outcome(name, "engine", of_engine[name])


def outcome(check: str, subject: str, call: Callable[[], dict[str, Any]]) -> Outcome:
    """Whatever a check does becomes an outcome: one that breaks does not end the others."""
    import traceback

    import torch

    from .steps import Failed, NotApplicable

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Outcome(check, subject, "holds", call())
    except NotApplicable as error:
        return Outcome(check, subject, "-", reason=str(error))
    except Failed as error:
        return Outcome(check, subject, "fails", reason=str(error))
    except Exception as error:
        traceback.print_exc()
        return Outcome(check, subject, "fails", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def report(options: Options, outcomes: list[Outcome], left_out: list[str]) -> None:
    """The table, the last line, and the file."""
    import torch

    from core.output.render import Column, Row, Table, emit
    from core.profile.measure import device_name

    rows = [
        Row(
            {
                "subject": o.subject,
                "check": o.check,
                "verdict": o.verdict,
                "figures": ", ".join(
                    f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in o.figures.items()
                )
                or o.reason,
            }
        )
        for o in outcomes
    ]
    columns = [Column(name, align="left") for name in ("subject", "check", "verdict", "figures")]
    print()
    emit(Table(f"checks on {device_name(torch.device(options.device))}", columns, rows, left_out))
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("holds", "fails", "-")}
    print(f"\n{counts['holds']} hold, {counts['fails']} fail, {counts['-']} have no meaning for their subject")
    if options.device == "cpu":
        print("on a CPU: this says that the checks run, and nothing about CUDA")
    target = options.output or ("results/cuda.json" if options.device == "cuda" else None)
    if target:
        figures = {
            "device": device_name(torch.device(options.device)),
            "checks": [asdict(o) for o in outcomes],
            "left_out": left_out,
        }
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(figures, indent=1) + "\n")
        print(f"wrote {target}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
