"""A stage that computes a file for the next one in place of training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_experiment import train

from core.checkpoint.run_folder import find_checkpoint
from core.config import to_dict
from core.engine.keys.check import checked
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
        torch.save({"mean": self.factor * points.mean(0), "head": trainer.network.head.weight.detach()}, folder / "mean.pt")
        with (Path(folder) / "calls.txt").open("a") as log:
            log.write("called\\n")
        return {"points": len(points), "factor": self.factor}


class Shifted(Net):
    """Less the mean of a file."""

    def __init__(self, width=16, dropout=0.0, depth=2, mean=None):
        super().__init__(width, dropout, depth)
        there = isinstance(mean, str)
        self.register_buffer("mean", torch.load(mean)["mean"] if there else torch.zeros(8))

    def forward(self, x):
        return super().forward(x - self.mean)
'''

STAGES = (
    "stages=[{name: first, train_cfg: {max_epochs: 1}},"
    " {name: between, load_from: {stage: first},"
    " compute: {type: mymeans.Mean, factor: 1.0, dataloader: {batch_size: 7, dataset: '${train_dataloader.dataset}'}}},"
    " {name: second, load_from: {stage: first, ignore: [network.mean]}, train_cfg: {max_epochs: 1},"
    " model: {network: {type: mymeans.Shifted, width: 16, mean: {stage: between, file: mean.pt}}}}]"
)
COMMON = (STAGES, "param_scheduler=null", "train_dataloader.dataset.augment=false")


@pytest.fixture
def staged(user, tiny):
    (user / "mymeans.py").write_text(JOB)
    return lambda *words: tiny(*COMMON, *words)


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
    assert torch.equal(state("run")["network.mean"], made["mean"]) and made["mean"].abs().max() > 0
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


def test_a_copied_run_is_whole(staged, user, monkeypatch):
    whole = staged("run_dir=run")
    shutil.move("run", "elsewhere")
    from core.engine.commands.test import main as test

    monkeypatch.syspath_prepend(str(user))
    test(["checkpoint=elsewhere", "output=again.json", "runtime=cpu"], "")
    found = json.loads(Path("again.json").read_text())
    assert found["metrics"]["accuracy"] == whole["metrics"]["accuracy"]


@pytest.mark.processes
def test_two_processes_compute_once_and_both_read_it(user):
    (user / "mymeans.py").write_text(JOB)
    train(user, *COMMON, "run_dir=two", torchrun=2)
    train(user, *COMMON, "run_dir=one")
    assert calls(user / "two") == 1
    stage = json.loads((user / "two/stage_1_between/result.json").read_text())
    assert stage["metrics"]["points"] == 40 and stage["processes"] == 2
    one, two = state(user / "one"), state(user / "two")
    assert torch.equal(one["network.mean"], two["network.mean"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("~stages.1.compute.dataloader", r"stages\.1.*compute\.dataloader: the data that it reads"),
        ("stages.1.compute.factr=2", "factr"),
        ("stages.1.compute.dataloader.batch_sice=2", "batch_sice"),
        ("stages.1.compute.type=mymeans.Men", "Men"),
        ("stages.1.compute.dataloader.dataset.cuont=3", "cuont"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_built(staged, words, message):
    word = f"+{words}" if "=" in words and "type=" not in words else words
    with pytest.raises(ConfigError, match=message):
        staged(word, "run_dir=run")
    assert not Path("run").exists()


def test_such_a_stage_is_known_by_what_it_computes(user, tiny_config):
    (user / "mymeans.py").write_text(JOB)
    from core.config.fingerprint import fingerprint

    one, other = tiny_config(*COMMON), tiny_config(*COMMON, "stages.1.compute.factor=2.0")
    assert fingerprint(one) != fingerprint(other)
    assert yaml.safe_load(yaml.safe_dump(checked(to_dict(one))["stages"][1]))["compute"]["factor"] == 1.0
