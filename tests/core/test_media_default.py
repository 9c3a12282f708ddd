"""What ``media(batch)`` shows without a hook in the config: it costs a run neither its figures nor its life."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import compose
from core.config.fingerprint import fingerprint
from core.engine.launch import run
from core.errors import ConfigError

PACKAGE = """
import torch

import mypoints


class Painter(mypoints.Classify):
    def media(self, batch):
        assert not self.training
        noise = torch.randint(0, 255, (4, 4, 3), dtype=torch.uint8)
        with open("calls.txt", "a") as file:
            file.write(f"{len(batch['label'])}\\n")
        return {"points": noise}


class Clumsy(mypoints.Classify):
    def media(self, batch):
        torch.randn(3)
        raise RuntimeError("the brush broke")
"""
SHORT = ("train_cfg.max_epochs=2", "model.network.dropout=0.2")


@pytest.fixture
def painter(user, tmp_path, monkeypatch):
    """Composes the tiny experiment with a trainer that paints."""
    (tmp_path / "mypainters.py").write_text(PACKAGE)
    for folder in (user, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mypainters", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*overrides, painter="Painter"):
        words = ["experiment=mine/tiny", "runtime=cpu", f"model.type=mypainters.{painter}", *overrides]
        return compose(words, config_dir=user / "configs")

    return call


def pictures(result):
    return sorted(p.name for p in (Path(result["run_dir"]) / "media").glob("*"))


def test_media_alone_gives_pictures_and_changes_nothing_else(painter):
    shown, dark = painter(*SHORT), painter(*SHORT, "media=null")
    with_pictures, without = run(shown), run(dark)
    assert pictures(with_pictures) == ["points_step_00000010.png", "points_step_00000020.png"]
    assert pictures(without) == []
    assert fingerprint(shown) == fingerprint(dark)
    assert with_pictures["metrics"] == without["metrics"]
    one, other = (model_state(find_checkpoint(r["run_dir"])) for r in (with_pictures, without))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_hook_of_the_experiments_own_is_the_only_one(painter, tmp_path):
    result = run(painter(*SHORT, "custom_hooks=[{type: core.MediaHook, max_items: 3, interval: 2}]"))
    assert pictures(result) == ["points_step_00000020.png"]
    assert (tmp_path / "calls.txt").read_text().split() == ["3"]


def test_keys_of_media_are_the_hooks_arguments(painter, tmp_path):
    assert pictures(run(painter(*SHORT, "media.max_items=2", "media.interval=2"))) == ["points_step_00000020.png"]
    assert (tmp_path / "calls.txt").read_text().split() == ["2"]


def test_a_long_training_is_shown_some_ten_times_and_at_its_end(painter):
    result = run(painter("train_dataloader.dataset.count=4", "train_cfg.max_epochs=25"))
    assert pictures(result) == [f"points_step_{step:08d}.png" for step in (3, 6, 9, 12, 15, 18, 21, 24, 25)]


def test_pictures_that_fail_do_not_end_the_run(painter):
    broken, whole = run(painter(*SHORT, painter="Clumsy")), run(painter(*SHORT, "media=null", painter="Clumsy"))
    assert broken["status"] == "finished" and pictures(broken) == []
    assert broken["metrics"] == whole["metrics"]
    log = (Path(broken["run_dir"]) / "run.log").read_text()
    assert "Clumsy.media(batch)" in log and "RuntimeError: the brush broke" in log and "media=null" in log


@pytest.mark.parametrize(
    ("word", "message"),
    [("+media.intervall=2", "media.*intervall.*did you mean 'interval'"), ("media.interval=0", "interval=0")],
)
def test_keys_of_media_that_cannot_be_meant(painter, word, message):
    with pytest.raises(ConfigError, match=message):
        run(painter(word))
