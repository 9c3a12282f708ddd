"""A stage that computes a file for the next one in place of training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_experiment import train

from core.checkpoint.run_folder import find_checkpoint
from core.config import compose
from core.config.fingerprint import fingerprint
from core.engine.commands.evaluation import evaluate
from core.engine.launch import run
from core.engine.run.config import configured
from core.errors import ConfigError

JOB = '''
from pathlib import Path

import torch
from torch import nn

from mypoints import Net


class Mean:
    """Writes the mean point, times a factor, and tells what it was given."""

    def __init__(self, factor=1.0, fails=False):
        self.factor, self.fails = factor, fails

    def __call__(self, trainer, loader, folder):
        if self.fails:
            raise RuntimeError("no mean today")
        points = torch.cat([batch["image"] for batch in loader])
        assert not trainer.training
        head = trainer.network.head.weight.detach()
        torch.save({"mean": self.factor * points.mean(0), "head": head}, folder / "mean.pt")
        with (Path(folder) / "calls.txt").open("a") as log:
            log.write("called\\n")
        return {"points": len(points), "factor": self.factor}


class Shifted(Net):
    """Less the mean of a file."""

    def __init__(self, width=16, dropout=0.0, depth=2, mean=None):
        super().__init__(width, dropout, depth)
        there = isinstance(mean, str)
        # Not in the state dict: without the file, a run's weights are not enough.
        self.register_buffer("mean", torch.load(mean)["mean"] if there else torch.zeros(8), persistent=False)

    def forward(self, x):
        return super().forward(x - self.mean)
'''

STAGED = """# @package _global_
# The tiny experiment with a file between its stages.
defaults: [/experiment/mine/tiny, _self_]
name: mine/staged
param_scheduler: null
train_dataloader: {dataset: {augment: false}}
stages:
  - name: first
    train_cfg: {max_epochs: 1}
  - name: between
    load_from: {stage: first}
    compute:
      type: mymeans.Mean
      factor: 1.0
      fails: false
      dataloader: {batch_size: 7, dataset: "${train_dataloader.dataset}"}
  - name: second
    load_from: {stage: first}
    train_cfg: {max_epochs: 1}
    model: {network: {type: mymeans.Shifted, width: 16, mean: {stage: between, file: mean.pt}}}
"""


@pytest.fixture
def composed(user, tmp_path, monkeypatch):
    """Composes the staged experiment, in a folder of the test's own."""
    (user / "mymeans.py").write_text(JOB)
    (user / "configs" / "experiment" / "mine" / "staged.yaml").write_text(STAGED)
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    return lambda *words: compose(["experiment=mine/staged", "runtime=cpu", *words], config_dir=user / "configs")


@pytest.fixture
def staged(composed):
    return lambda *words: run(composed(*words))


def state(run):
    return torch.load(find_checkpoint(run), weights_only=True)["model"]


def calls(run):
    return len((Path(run) / "stage_1_between" / "calls.txt").read_text().splitlines())


def test_a_file_is_computed_from_one_stage_and_read_by_the_next(staged):
    result = staged("run_dir=run")
    assert result["stages"]["between"] == {"points": 40, "factor": 1.0}
    assert set(result["stages"]) == {"first", "between", "second"} and result["metrics"]["seen"] == 21
    made = torch.load("run/stage_1_between/mean.pt")
    assert torch.equal(made["head"], state("run/stage_0_first")["network.head.weight"])
    assert made["mean"].abs().max() > 0
    assert not torch.equal(state("run")["network.head.weight"], made["head"])
    stage = json.loads(Path("run/stage_1_between/result.json").read_text())
    assert stage["steps"] == 0 and stage["status"] == "finished"


def test_finished_and_interrupted_runs_go_on(staged):
    whole = staged("run_dir=run")
    staged("run_dir=run", "resume=auto")
    assert calls("run") == 1
    shutil.copytree("run", "killed")  # as if it had been killed in the last stage: nothing of that is there
    shutil.rmtree("killed/stage_2_second")
    Path("killed/result.json").unlink()
    again = staged("run_dir=killed", "resume=auto")
    assert calls("killed") == 1 and again["metrics"] == whole["metrics"]
    assert all(torch.equal(value, state("killed")[name]) for name, value in state("run").items())
    shutil.copytree("run", "earlier")  # and while it computed: a file may be there, but no result
    shutil.rmtree("earlier/stage_2_second")
    for file in ("result.json", "stage_1_between/result.json"):
        Path("earlier", file).unlink()
    staged("run_dir=earlier", "resume=auto")
    assert calls("earlier") == 2
    assert all(torch.equal(value, state("earlier")[name]) for name, value in state("run").items())


def test_a_computation_that_fails_is_computed_when_the_run_goes_on(staged):
    with pytest.raises(Exception, match="no mean today"):
        staged("run_dir=run", "stages.1.compute.fails=true")
    assert not Path("run/result.json").exists() and not Path("run/stage_1_between/result.json").exists()
    shutil.rmtree("run/stage_1_between")
    Path("run/config.yaml").unlink()
    assert staged("run_dir=run", "resume=auto")["stages"]["between"]["points"] == 40


def test_a_copied_run_is_whole(staged):
    """Its last stage reads the file that lies in the copy, not the one that the run has written."""
    whole = staged("run_dir=run")
    shutil.move("run", "elsewhere")
    cfg, file = configured("elsewhere", [])
    assert evaluate(cfg, file, split="val")["accuracy"] == whole["metrics"]["accuracy"]


@pytest.mark.processes
def test_two_processes_compute_once_and_both_read_it(user, composed):
    composed()
    train(user, "experiment=mine/staged", "run_dir=two", torchrun=2)
    train(user, "experiment=mine/staged", "run_dir=one")
    assert calls(user / "two") == 1
    stage = json.loads((user / "two/stage_1_between/result.json").read_text())
    assert stage["metrics"]["points"] == 40 and stage["processes"] == 2
    one, two = (torch.load(user / name / "stage_1_between" / "mean.pt")["mean"] for name in ("one", "two"))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("~stages.1.compute.dataloader", r"stages\.1.*compute\.dataloader: the data that it reads"),
        ("stages.1.compute.factr=2", "factr"),
        ("stages.1.compute.dataloader.batch_size=many", "batch_size"),
        ("stages.1.compute.type=mymeans.Men", "Men"),
        ("stages.1.compute.dataloader.dataset.cuont=3", "cuont"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_built(staged, words, message):
    word = f"+{words}" if "factr" in words or "cuont" in words else words
    with pytest.raises(ConfigError, match=message):
        staged(word, "run_dir=run")
    assert not Path("run/stage_0_first/checkpoints").exists()


def test_such_a_run_is_known_by_what_it_computes(composed):
    assert fingerprint(composed()) != fingerprint(composed("stages.1.compute.factor=2.0"))
    assert fingerprint(composed()) != fingerprint(composed("stages.1.compute.dataloader.batch_size=3"))
