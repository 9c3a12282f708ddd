"""Training data that a trainer derives from its weights: a resumed run derives them from those that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from core.config import compose
from core.engine.commands.evaluation import evaluate
from core.engine.launch import run
from core.errors import ConfigError
from core.trainer import Trainer
from tests.killing import assert_same_run, killed_in_phase

FIRST = "load_from={path: first.pt, into: %s}"


class Embedded(torch.utils.data.Dataset):
    """What a network makes of points."""

    def __init__(self, points, network):
        with torch.no_grad():
            self.x = torch.stack([network(points.points[index]) for index in range(len(points))])
        self.label = points.label

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"image": self.x[index], "label": int(self.label[index]), "sample_id": str(index)}


class Derived(Trainer):
    """Learns from what one of its parts, named `source`, made of the points when training began."""

    def __init__(self, source="head", frozen=("eye",)):
        super().__init__(frozen)
        self.eye, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.source = source

    def training_data(self, dataset):
        return Embedded(dataset, self.get_submodule(self.source))

    def losses(self, batch):
        return {"loss": nn.functional.cross_entropy(self.head(batch["image"]), batch["label"])}


@pytest.fixture
def train(user, tmp_path, monkeypatch):
    """Runs the tiny experiment with the trainer above and weights of a file for the part that data come from."""
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    torch.save(nn.Linear(8, 8).state_dict(), "first.pt")

    def call(source, *overrides):
        words = ["experiment=mine/tiny", "runtime=cpu", "~model", "train_cfg.max_epochs=1", "checkpoint.every_steps=1"]
        words += [f"+model={{type: {__name__}.Derived, source: {source}, frozen: [eye]}}", FIRST % source]
        words += ["val_dataloader=null", "val_evaluator=null", "train_cfg.val_every_epochs=null"]
        return run(compose([*words, *overrides], config_dir=user / "configs"))

    return call


@pytest.mark.parametrize("source", ["eye", "head"], ids=["a frozen part", "a part that is trained"])
def test_they_are_derived_from_the_weights_that_the_run_began_with(train, source):
    train(source, "run_dir=undisturbed")
    with killed_in_phase(5):
        train(source, "run_dir=killed")
    train(source, "run_dir=killed", "resume=auto")
    assert_same_run(Path("undisturbed"), Path("killed"))


@pytest.mark.parametrize("gone", ["removed", "changed"])
def test_a_frozen_part_comes_from_the_checkpoint_where_its_file_is_gone(train, gone):
    train("eye", "run_dir=undisturbed")
    with killed_in_phase(5):
        train("eye", "run_dir=killed")
    if gone == "removed":
        Path("first.pt").unlink()
    else:
        torch.save(nn.Linear(8, 8).state_dict(), "first.pt")
    train("eye", "run_dir=killed", "resume=auto")
    assert_same_run(Path("undisturbed"), Path("killed"))
    assert "checkpoints/step_00000004.pt are taken" in Path("killed/run.log").read_text()


def test_a_trained_part_whose_first_weights_are_gone_is_an_error(train):
    with killed_in_phase(5):
        train("head", "run_dir=killed")
    Path("first.pt").unlink()
    with pytest.raises(ConfigError, match=r"no longer those that the run began with \(head.weight, head.bias\)"):
        train("head", "run_dir=killed", "resume=auto")


class Judged(Derived):
    """Evaluates on what a frozen part makes of the points; says which weights that part had."""

    asked: ClassVar[list] = []

    def training_data(self, dataset):
        return dataset

    def evaluation_data(self, dataset):
        self.asked.append((len(dataset), self.eye.weight.detach().clone()))
        return Embedded(dataset, self.eye)

    def predict(self, batch):
        return {"logits": batch["image"], "label": batch["label"]}


def test_evaluations_are_derived_once_from_the_weights_that_are_evaluated(user, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    Judged.asked.clear()
    words = ["experiment=mine/tiny", "runtime=cpu", "~model", "train_cfg.max_epochs=2", "run_dir=trained"]
    words += [f"+model={{type: {__name__}.Judged, frozen: [eye]}}", "runtime.sanity_batches=0"]
    cfg = compose(words, config_dir=user / "configs")
    trained = run(cfg)["metrics"]
    assert [size for size, _ in Judged.asked] == [21], "once, though two epochs were validated"
    eye = Judged.asked.pop()[1]
    cfg.seed = 5  # the model is built with other weights, and those of the checkpoint are loaded
    found = evaluate(cfg, "trained", split="val")
    assert len(Judged.asked) == 1 and torch.equal(Judged.asked[0][1], eye)
    assert found["accuracy"] == trained["accuracy"]
