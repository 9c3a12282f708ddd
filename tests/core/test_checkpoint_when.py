"""When checkpoints are written, and which of them stay: by epochs, by steps, the best of several figures."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from core.checkpoint import CheckpointStore
from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config.fingerprint import fingerprint
from core.errors import ConfigError


def kept(result):
    return CheckpointStore(Path(result["run_dir"]) / "checkpoints").steps()


# ---------------------------------------------------------------------- epochs and steps
def test_a_checkpoint_every_n_epochs_and_at_the_end(tiny):
    words = ("train_cfg.max_epochs=5", "checkpoint.keep_last=null")  # an epoch has 10 steps
    assert kept(tiny(*words, "checkpoint.every_epochs=2")) == [20, 40, 50]
    assert kept(tiny(*words)) == [10, 20, 30, 40, 50]
    assert kept(tiny(*words, "checkpoint.every_steps=20")) == [20, 40, 50]


def test_a_run_goes_on_exactly_from_the_end_of_an_nth_epoch(tiny):
    words = ("train_cfg.max_epochs=5", "checkpoint.every_epochs=2", "model.network.dropout=0.2")
    whole, stopped = tiny(*words), tiny(*words)
    folder = Path(stopped["run_dir"])
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step_00000050.pt").unlink()
    resumed = tiny(*words, f"resume={folder}")
    assert resumed["resumed_from"].endswith("step_00000040.pt") and resumed["metrics"] == whole["metrics"]
    one, other = (model_state(find_checkpoint(r["run_dir"])) for r in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_when_checkpoints_are_written_does_not_change_what_a_run_is(tiny_config):
    assert fingerprint(tiny_config("checkpoint.every_epochs=2")) == fingerprint(tiny_config())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("checkpoint.every_epochs=2", "checkpoint.every_steps=5"), "every_steps or every_epochs, not both"),
        (("checkpoint.every_epochs=0",), r"checkpoint\.every_epochs=0"),
        (("checkpoint.every_steps=1.5",), r"checkpoint\.every_steps.*1\.5"),
        (("checkpoint.every_epoch=2",), r"did you mean checkpoint\.every_epochs"),
    ],
)
def test_times_that_cannot_be_meant(tiny, words, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*words)


# ---------------------------------------------------------------------- the best of several figures
def judged(result):
    """{step: figures} of the checkpoints that stayed."""
    store = CheckpointStore(Path(result["run_dir"]) / "checkpoints")
    return {step: store.metrics(step) for step in store.steps()}


SEVERAL = (
    "~val_evaluator",
    "+val_evaluator=[{type: test_checkpoint_when.Zigzag, name: up}, {type: test_checkpoint_when.Zigzag, name: down}]",
    "train_cfg.max_epochs=5",
    "checkpoint.keep_last=1",
)


class Zigzag:
    """Figures that do not hang on the weights: `up` is best at the second epoch, `down` lowest at the fourth."""

    COURSE: ClassVar = {"up": [0.1, 0.9, 0.2, 0.3, 0.4], "down": [5.0, 4.0, 3.0, 1.0, 2.0]}

    def __init__(self, name):
        self.name, self.calls, self.dataset_meta = name, 0, None

    def process(self, data_batch, data_samples):
        pass

    def evaluate(self, size):
        self.calls += 1
        return {self.name: self.COURSE[self.name][self.calls - 1]}


@pytest.mark.parametrize(
    ("metric", "steps", "first"),
    [
        ("checkpoint.metric={up: higher, down: lower}", [20, 40, 50], 20),
        ("checkpoint={metric: [down, up], direction: lower}", [10, 40, 50], 40),  # the lowest `up` comes first
    ],
)
def test_the_best_of_every_figure_stays(tiny, metric, steps, first):
    result = tiny(*SEVERAL, metric)
    assert kept(result) == steps
    assert find_checkpoint(result["run_dir"], best=True).name == f"step_{first:08d}.pt"
    assert find_checkpoint(result["run_dir"], best="down").name == "step_00000040.pt"
    assert judged(result)[40] == {"up": 0.3, "down": 1.0}
    with pytest.raises(ConfigError, match=r"no best checkpoint by 'loss'.*(up, down|down, up)"):
        find_checkpoint(result["run_dir"], best="loss")


def test_the_first_of_several_figures_is_what_evaluate_best_means(tiny):
    test = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"
    words = (*SEVERAL, test, "+test_evaluator={type: mypoints.Accuracy}", "evaluate=best")
    result = tiny(*words, "checkpoint.metric={down: lower, up: higher}")
    assert result["val_metrics"]["down"] == 1.0 and result["metrics"]["seen"] == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("checkpoint.metric={accuracy: upper}",), r"checkpoint\.metric\.accuracy.*upper"),
        (("checkpoint.metric=[accuracy,accuracy]",), r"a list of different names"),
        (("checkpoint.metric=[accuracy,5]",), r"checkpoint\.metric\.1.*5"),
        (("checkpoint.metric=5",), r"checkpoint\.metric.*5"),
        (("checkpoint.metric=accuracy", "checkpoint.direction=best"), r"checkpoint\.direction.*best"),
        (("checkpoint.metric=[accuracy,top1]",), r"checkpoint\.metric 'top1' is none of \['accuracy', 'seen'\]"),
    ],
)
def test_figures_that_cannot_be_meant(tiny, words, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*words, "train_cfg.max_epochs=1")
