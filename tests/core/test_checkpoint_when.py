"""When checkpoints are written, and which of them stay: by epochs, by steps, the best of several figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.checkpoint import CheckpointStore
from core.errors import ConfigError
from core.results import fingerprint
from core.run_folder import find_checkpoint
from core.weights import model_state


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
        (("checkpoint.every_steps=1.5",), r"checkpoint\.every_steps=1\.5"),
        (("checkpoint.every_epoch=2",), r"did you mean checkpoint\.every_epochs"),
    ],
)
def test_times_that_cannot_be_meant(tiny, words, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*words)
