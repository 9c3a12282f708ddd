"""A run's stored config trains again: the same to the bit, or with a key changed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_experiment import ROOT

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config.fingerprint import fingerprint
from core.errors import ConfigError

SHORT = ("+vars.width=12", "model.network.width=${vars.width}", "train_cfg.max_epochs=1", "model.network.dropout=0.2")


@pytest.fixture
def again(tiny_config):
    """`tools/train.py` with these words, in this process."""
    spec = importlib.util.spec_from_file_location("train_tool", ROOT / "tools" / "train.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*words):
        tool.main(list(words))
        return json.loads((Path("runs/mine/tiny/latest").resolve() / "result.json").read_text())

    return call


def stored(result):
    return yaml.safe_load((Path(result["run_dir"]) / "config.yaml").read_text())


def test_a_run_trained_again_is_the_same_run(tiny, again):
    first = tiny(*SHORT)
    second = again(f"rerun={first['run_dir']}")
    assert second["run_dir"] != first["run_dir"] and second["fingerprint"] == first["fingerprint"]
    assert second["metrics"] == first["metrics"]
    one, other = (model_state(find_checkpoint(r["run_dir"])) for r in (first, second))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_override_changes_the_key_that_it_names(tiny, again):
    first = tiny(*SHORT)
    second = again(
        "rerun=runs/mine/tiny/latest", "seed=1", "+custom_hooks.mine={type: core.MediaHook}", "~param_scheduler"
    )
    before, after = stored(first), stored(second)
    assert (after["seed"], after["param_scheduler"]) == (1, None)
    assert after["custom_hooks"] == {"mine": {"type": "core.MediaHook"}}
    assert after["model"] == before["model"] and after["vars"] == {"width": 12}
    assert second["overrides"][-3:] == ["seed=1", "+custom_hooks.mine={type: core.MediaHook}", "~param_scheduler"]
    third = stored(again(f"rerun={second['run_dir']}", "vars.width=16"))  # no interpolation is left
    assert (third["vars"]["width"], third["model"]["network"]["width"]) == (16, 12)
    assert fingerprint(third) == fingerprint(after)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rerun=runs/nothing",), r"rerun=runs/nothing: no run's folder"),
        (("rerun=RUN", "experiment=mine/tiny"), r"experiment=mine/tiny stands beside rerun="),
        (("rerun=RUN", "model.network.widht=3"), r"did you mean .*width"),
        (("rerun=RUN", "seed=1,2"), r"seed=1,2 .* one command trains one run again"),
        (("-m", "rerun=RUN", "seed=1,2"), r"-m does not go together with rerun="),
    ],
)
def test_what_cannot_be_trained_again(tiny, again, words, message):
    run = tiny("train_cfg.max_epochs=1")["run_dir"] if "rerun=RUN" in words else None
    with pytest.raises(ConfigError, match=message):
        again(*[word.replace("RUN", str(run)) for word in words])
