"""`tools/find_lr.py`: a learning rate from one short sweep, as Smith's range test, fastai and Lightning have it.

The rate grows exponentially from step to step while the training goes on; the smoothed loss falls, then rises. The
suggestion is where it falls steepest over the logarithm of the rate. Nothing that is trained is kept.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.command.cli import parse
from core.engine.commands.lr_curve import LossCurve, judge
from core.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class Options:
    """How the sweep goes."""

    experiment: str = field(metadata={"help": "what is trained, e.g. stvit/digits"})
    min: float = field(default=1e-7, metadata={"help": "first rate"})
    max: float = field(default=1.0, metadata={"help": "last rate"})
    steps: int = field(default=100, metadata={"help": "updates from the first to the last"})
    part: str | None = field(default=None, metadata={"help": "of several optimizers, the one whose rate is swept"})
    loss: str = field(default="loss", metadata={"help": "the term that is watched, e.g. loss_l1"})
    stage: str | None = field(default=None, metadata={"help": "of an experiment with stages, the one; null: the last"})
    output: str | None = field(default=None, metadata={"help": "folder; null: runs_dir/lr/EXPERIMENT/TIME"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs of your own"})


def find_lr(cfg: DictConfig | dict[str, Any], options: Options, folder: str | Path) -> LossCurve:
    """Trains an experiment once along growing rates.

    Precision, accumulation, clipping, groups (each keeps its factor) and several processes are as in a run; there are
    no schedules, evaluations, averages, checkpoints and hooks of the experiment.

    Args:
        cfg: the experiment.
        options: see `Options`.
        folder: for the log of the sweep.

    Raises:
        ConfigError: nothing is trained; rates or steps that make no sweep; a part or a loss that does not exist.
    """
    from core.config.command.processes import first_decides
    from core.engine.keys.check import checked
    from core.engine.launch import process_set_up
    from core.engine.run.config import stage_for

    if not 0 < options.min < options.max or options.steps < 10:
        raise ConfigError(
            f"min={options.min:g}, max={options.max:g}, steps={options.steps}: 0 < min < max, and at least 10 steps"
        )
    plain = checked(stage_for(cfg, None, options.stage))
    if not plain["train_dataloader"] or not plain["optim_wrapper"]:
        raise ConfigError(f"{plain['name']} trains nothing: it has no train_dataloader, or no optim_wrapper")
    plain |= dict.fromkeys(("val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator", "ema", "media"))
    plain |= dict.fromkeys(("param_scheduler", "custom_hooks", "visualizer"))
    plain |= {"train_cfg": {"max_steps": options.steps * _micro_steps(plain["optim_wrapper"])}}
    plain["runtime"] = {**plain["runtime"], "fast_dev_run": False}  # a sweep is as long as its own options say
    with process_set_up(plain["runtime"]):
        plain["run_dir"] = first_decides(lambda: str(folder))  # each process has a time of its own
        return _swept(plain, options)


def _micro_steps(optim_wrapper: Any) -> int:
    """Most micro-steps of an update that any optimizer of the config takes."""
    if not isinstance(optim_wrapper, Mapping):
        return 1
    inner = [_micro_steps(value) for value in optim_wrapper.values()]
    return max([int(optim_wrapper.get("accumulative_counts") or 1), *inner])


def _swept(cfg: dict[str, Any], options: Options) -> LossCurve:
    from core.engine.hooks.finite import NonFiniteGradient, NonFiniteLoss
    from core.engine.hooks.lr_sweep import LRSweep
    from core.engine.runner import Runner

    class SweepRunner(Runner):
        """A run of which nothing stays."""

        def save_state(self, must: bool = False, interim: bool = False) -> Path | None:
            return None

        def save_debug_state(self, step: int, terms: dict[str, float], batch: Any) -> Path:
            return Path(self.work_dir)

    Path(cfg["run_dir"]).mkdir(parents=True, exist_ok=True)
    runner = SweepRunner(cfg)
    hook = LRSweep(options.min, options.max, options.steps, options.part, options.loss)
    runner.register_hook(hook)
    try:
        with contextlib.suppress(NonFiniteLoss, NonFiniteGradient):  # where a sweep is meant to end
            runner.train()
            return judge(hook.rates, hook.losses, hook.diverged)
        return judge(hook.rates, hook.losses, hook.rate)
    finally:
        runner.call_hook("after_run")
        runner.visualizer.close()


def picture(found: LossCurve, path: Path, title: str, what: str) -> None:
    """A PNG of the losses over the rate, with the suggestion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel=what, title=title)
    axes.plot(found.rates, found.losses, color="0.8", label="every update")
    axes.plot(found.rates, found.smoothed, color="tab:blue", label="smoothed")
    if found.suggestion is not None:
        axes.axvline(found.suggestion, color="tab:red", linestyle="--", label=f"steepest: {found.suggestion:.2g}")
    low, high = min(found.smoothed), max(found.smoothed[: max(1, len(found.smoothed) // 2)])
    axes.set_ylim(low - 0.1 * (high - low) - 1e-12, high + 0.5 * (high - low) + 1e-12)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str], doc: str) -> None:
    """The command line of ``tools/find_lr.py``."""
    options, overrides = parse(argv, Options, doc=doc, positional="experiment", overrides=True)
    from core.config.command.messages import first_process, to_stderr
    from core.config.composition import compose

    cfg = compose([f"experiment={options.experiment}", *overrides], options.config_dir)
    folder = Path(options.output) if options.output else _folder(cfg)
    with to_stderr():
        found = find_lr(cfg, options, folder)
    if not first_process():
        return
    if not found.losses:
        raise ConfigError(f"the loss is not finite at the first rate already: min={options.min:g} is too high?")
    record = {"experiment": options.experiment, "overrides": overrides, "loss": options.loss, "part": options.part}
    (folder / "lr.json").write_text(json.dumps({**record, **asdict(found)}, indent=1) + "\n")
    of = f", optimizer {options.part}" if options.part else ""
    picture(found, folder / "lr.png", f"{options.experiment}{of}", options.loss)
    end = "" if found.diverged is None else f"; it diverges at {found.diverged:.3g}"
    if found.suggestion is None:
        print(f"no suggestion: the loss never falls between {options.min:g} and {found.rates[-1]:.3g}{end}")
    else:
        print(f"suggestion: {found.suggestion:.3g}, where the loss falls steepest")
        print(f"lowest loss at {found.lowest:.3g}{end}")
    print(f"{folder / 'lr.png'}\n{folder / 'lr.json'}")


def _folder(cfg: DictConfig) -> Path:
    import datetime

    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return Path(cfg.runs_dir) / "lr" / cfg.name / stamp
