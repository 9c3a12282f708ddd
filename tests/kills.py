"""Kills runs at random moments, lets them go on, and holds what they end as against runs that nobody touched.

  python -m tests.kills                  20 kills over three experiments; some eight minutes on one core
  python -m tests.kills seed=5 kills=60  other moments, and more of them

SIGKILL, from the start of a process (imports, building, filling caches) to its last evaluation: at moments that are
drawn over the course of a whole run, one in every stage and the others anywhere. The experiments: one stage with
workers, dropout, averaged weights and a hook that keeps its state in attributes; three stages with caches
(seqgan/shape_glyphs, small), whose codes are lost at half of the kills; two optimizers in turn. Final weights,
optimizers, averages, what hooks keep, logged losses and result files have to be equal bit for bit; times, memory and
places are left out. Writes results/engine_kills.json.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.config.command.cli import parse, run
from core.engine.runner import versions
from core.errors import VitrineError
from tests.core.tiny_experiment import EXPERIMENT, PACKAGE, environment
from tests.killing import lasting, losses, states

ROOT = Path(__file__).parents[1]
CODES = "data/shape_glyphs/codes"
HOOK = """

from mmengine.hooks import Hook


class Tally(Hook):
    def __init__(self):
        self.count, self.recent, self.total = 0, [], torch.zeros(())

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.count += 1
        self.recent = [*self.recent[-2:], float(outputs["loss"])]
        self.total += outputs["loss"]
        if self.count % 5 == 0:
            with torch.no_grad():
                next(runner.model.parameters()).add_(self.total * sum(self.recent), alpha=1e-4)
"""
DUEL = [
    "~model",
    "+model={type: mypoints.Duel, generator: {type: torch.nn.Linear, in_features: 8, out_features: 8},"
    " discriminator: {type: mypoints.Net, dropout: 0.2}}",
    "~optim_wrapper",
    "+optim_wrapper={generator: {optimizer: {type: torch.optim.Adam, lr: 0.01}, params: [generator]},"
    " discriminator: {optimizer: {type: torch.optim.SGD, lr: 0.1, momentum: 0.9}, params: [discriminator]}}",
    "val_dataloader=null",
    "val_evaluator=null",
    "train_cfg.val_every_epochs=null",
]


@dataclass
class Options:
    """What is killed how often."""

    seed: int | None = field(default=None, metadata={"help": "of the moments; null: the time"})
    kills: int = field(default=20, metadata={"help": "over all experiments"})
    output: str = field(default="results/engine_kills.json", metadata={"help": "file that is written"})


@dataclass
class Experiment:
    """A small run.

    name: for the report.
    words: of tools/train.py.
    loses: a folder that may be gone when the run goes on.
    """

    name: str
    words: list[str]
    loses: str | None = None


TINY = ["--config-dir", "configs", "experiment=mine/tiny", "runtime=cpu", "log_every=3", "media=null"]
EXPERIMENTS = (
    Experiment(
        "one stage: workers, dropout, averaged weights, a hook with plain state",
        [
            *TINY,
            "custom_hooks=[{type: mypoints.Tally}]",
            "train_dataloader.num_workers=2",
            "train_dataloader.dataset.slow=0.05",
            "model.network.dropout=0.2",
            "ema={decay: 0.95}",
            "checkpoint.every_steps=4",
            "train_cfg.max_epochs=6",
            "train_cfg.val_every_epochs=null",
            "train_cfg.val_every_steps=7",
        ],
    ),
    Experiment(
        "stages with caches: seqgan/shape_glyphs, small",
        [
            "experiment=seqgan/shape_glyphs",
            "runtime=cpu",
            "log_every=3",
            "stages.2.model.network.dim=16",
            "stages.2.model.network.depth=1",
            "+train_dataloader.dataset.count=512",
            "train_dataloader.batch_size=16",
            "+stages.2.test_dataloader.dataset.count=60",
            "train_cfg.max_steps=50",
            "stages.1.train_cfg.max_steps=40",
            "stages.2.train_cfg.max_steps=60",
            "param_scheduler.0.warmup=5",
            "checkpoint.every_steps=10",
        ],
        CODES,
    ),
    Experiment(
        "two optimizers in turn",
        [*TINY, *DUEL, "train_dataloader.dataset.slow=0.01", "checkpoint.every_steps=4", "train_cfg.max_epochs=12"],
    ),
)


def prepared(home: Path) -> None:
    """What runs find in the folder that they start in: the tiny experiment, and networks of a dozen steps."""
    from seqgan.standin import judges
    from seqgan.standin.shape_glyphs import ShapeGlyphs

    (home / "mypoints.py").write_text(PACKAGE + HOOK)
    (home / "configs/experiment/mine").mkdir(parents=True)
    (home / "configs/experiment/mine/tiny.yaml").write_text(EXPERIMENT)
    train = judges.train_network
    judges.train_network = lambda network, data, steps, title: train(network, data, 12, title)
    try:
        for kind in ("loss", "judge"):
            judges.trained_network(kind, ShapeGlyphs("train", 0, count=512), home / "data/shape_glyphs")
    finally:
        judges.train_network = train


class Bench:
    """Starts, kills and compares runs of one experiment in a folder.

    Args:
        experiment: what is run.
        home: folder that runs start in.
        chance: decides when they are killed.
    """

    def __init__(self, experiment: Experiment, home: Path, chance: random.Random) -> None:
        self.experiment, self.home, self.chance = experiment, home, chance
        process = self._start("undisturbed")
        began = time.monotonic()
        self.course = {"start": 0.0}  # places in the order in which a run comes to them: seconds since its start
        while process.poll() is None:
            self.course.setdefault(self._place("undisturbed"), time.monotonic() - began)
            time.sleep(0.02)
        if process.returncode != 0:
            raise VitrineError(f"{experiment.name}: the undisturbed run fails\n{self._said('undisturbed')}")
        self.seconds = time.monotonic() - began
        self.kills: list[dict[str, Any]] = []
        self.runs = 0

    def _start(self, name: str) -> subprocess.Popen:
        command = [
            sys.executable,
            str(ROOT / "tools/train.py"),
            *self.experiment.words,
            f"run_dir={name}",
            "resume=auto",
        ]
        environ = {**environment(), "PYTHONPATH": str(ROOT)}
        with open(self.home / f"{name}.txt", "a") as output:
            return subprocess.Popen(command, cwd=self.home, env=environ, stdout=output, stderr=subprocess.STDOUT)

    def _said(self, name: str) -> str:
        return (self.home / f"{name}.txt").read_text()[-3000:]

    def moments(self, count: int) -> list[float]:
        """Seconds of the undisturbed run: one in every stage, the others anywhere; in an order of chance."""
        begins: dict[str, float] = {}
        for place, second in self.course.items():
            begins.setdefault(place.partition(" ")[0], second)
        bounds = [*begins.values(), self.seconds]
        drawn = [self.chance.uniform(*bounds[index : index + 2]) for index in range(len(begins))]
        drawn += [self.chance.uniform(0, self.seconds) for _ in range(count)]
        drawn = drawn[:count]
        self.chance.shuffle(drawn)
        return drawn

    def kill(self, count: int) -> None:
        """Kills runs that often, up to four times each, and compares each when it has come to its end.

        Raises:
            VitrineError: a run that goes on fails, or ends otherwise than the undisturbed one.
        """
        left = self.moments(count)
        while left:
            name, self.runs = f"killed{self.runs}", self.runs + 1
            share = sorted(left.pop() for _ in range(min(len(left), self.chance.randint(2, 4))))
            left += [self._sooner(moment) for moment in share if not self._kill_at(name, moment)]
            process = self._start(name)
            if process.wait() != 0:
                raise VitrineError(f"{self.experiment.name}: a run that goes on fails\n{self._said(name)}")
            self._compare(name)
            self._lose(surely=True)

    def _kill_at(self, name: str, moment: float) -> bool:
        """Kills a run where the undisturbed one was at a moment: at its place then, and as long after coming to it."""
        order, place = list(self.course), self._at(moment)
        process, reached = self._start(name), None
        while process.poll() is None:
            now = time.monotonic()
            at = self._place(name)
            if reached is None and (at not in order or order.index(at) >= order.index(place)):
                reached = now
            if reached is not None and now - reached >= moment - self.course[place]:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kill = {"progress": round(moment / self.seconds, 3), "at": at, "cache_lost": self._lose()}
                self.kills.append(kill)
                return True
            time.sleep(0.02)
        return False

    def _at(self, moment: float) -> str:
        """The place of the undisturbed run at a moment."""
        return [place for place, second in self.course.items() if second <= moment][-1]

    def _sooner(self, moment: float) -> float:
        """A moment that a run did not reach before it was over: less long after the same place."""
        begin = self.course[self._at(moment)]
        return begin + (moment - begin) / 2

    def _lose(self, surely: bool = False) -> bool:
        lost = self.experiment.loses is not None and (surely or self.chance.random() < 0.5)
        if lost:
            shutil.rmtree(self.home / self.experiment.loses, ignore_errors=True)
        return lost

    def _place(self, name: str) -> str:
        """How far a run is: its stage and the newest line of its log."""
        logs = sorted((self.home / name).rglob("log.jsonl"))
        if not logs:
            return "start"
        try:
            step = max(losses(logs[-1].parent), default=0)
        except ValueError:  # a line is being written
            step = 0
        return f"{logs[-1].parent.name if logs[-1].parent != self.home / name else 'training'} step {step}"

    def _compare(self, name: str) -> None:
        one, other = self.home / "undisturbed", self.home / name
        for what, read in (("states", states), ("results", _results), ("logs", _logs)):
            first, second = read(one), read(other)
            wrong = [key for key in {*first, *second} if not _same(first.get(key), second.get(key))]
            if wrong:
                raise VitrineError(f"{self.experiment.name}: {what} of {name} differ: {sorted(wrong)[:5]}")
        shutil.rmtree(other)


def _results(folder: Path) -> dict[str, Any]:
    paths = sorted(folder.rglob("result.json"))
    return {str(path.relative_to(folder)): lasting(json.loads(path.read_text())) for path in paths}


def _logs(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): losses(path.parent) for path in sorted(folder.rglob("log.jsonl"))}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def main(argv: list[str]) -> None:
    """The command."""
    options, _ = parse(argv, Options, doc=__doc__)
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    chance, began, report = random.Random(seed), time.monotonic(), []
    shares = [options.kills // len(EXPERIMENTS) + (i < options.kills % len(EXPERIMENTS)) for i in range(3)]
    with tempfile.TemporaryDirectory() as home:
        prepared(Path(home))
        for number, (experiment, share) in enumerate(zip(EXPERIMENTS, shares, strict=True)):
            place = Path(home) / f"bench{number}"
            place.mkdir()
            for name in ("mypoints.py", "configs", "data"):
                source = Path(home) / name
                (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
            bench = Bench(experiment, place, chance)
            bench.kill(share)
            report.append(
                {
                    "experiment": experiment.name,
                    "kills": bench.kills,
                    "runs": bench.runs,
                    "equal": True,
                    "seconds_undisturbed": round(bench.seconds, 1),
                }
            )
            print(f"{experiment.name}: {share} kills in {bench.runs} runs, all equal", flush=True)
    record = {
        "command": f"python -m tests.kills seed={seed} kills={options.kills}",
        "kills": sum(shares),
        "compared": "weights, optimizers, averages, what hooks keep, logged losses, result files: bit for bit",
        "experiments": report,
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
    }
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
