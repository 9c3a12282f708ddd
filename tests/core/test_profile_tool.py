"""tools/profile.py on the tiny experiment, and the tools' command lines."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_experiment import ROOT, environment

from core.errors import ConfigError
from core.output.render import as_dict
from core.profile.experiment import Options, profile_experiment
from tests import forked

TOOLS = ROOT / "tools"


@pytest.fixture
def measure(user, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)

    def call(*overrides, **options):
        settings = {"batch": 4, "repeats": 3, "threads": 1, "device": "cpu", "config_dir": str(user / "configs")}
        tables = profile_experiment(Options("mine/tiny", **{**settings, **options}), list(overrides))
        data = {table.name: as_dict(table) for table in tables}
        rows = {(row["quantity"]["value"], row["unit"]["value"]): row for row in data["summary"]["rows"]}
        return rows, data

    return call


def test_everything_is_measured(measure):
    rows, data = measure()
    assert rows["parameters", ""]["mine/tiny:median"]["value"] == 818
    macs = 8 * 16 + 2 * 256 + 32
    assert rows["forward pass of one sample", "KMACs"]["mine/tiny:median"]["value"] == pytest.approx(macs / 1e3)
    for quantity, batch in [("forward, batch 1", 1), ("forward, batch 4", 4), ("training step, batch 4", 4)]:
        rate, time_ = rows[quantity, "samples/s"], rows[quantity, "ms"]
        assert rate["mine/tiny:q1"]["value"] <= rate["mine/tiny:median"]["value"] <= rate["mine/tiny:q3"]["value"]
        assert rate["mine/tiny:median"]["value"] == pytest.approx(batch * 1e3 / time_["mine/tiny:median"]["value"])
    peak = rows["peak tensors of a training step, batch 4", "MiB"]["mine/tiny:median"]["value"]
    assert peak > rows["peak tensors of a forward pass, batch 4", "MiB"]["mine/tiny:median"]["value"] > 0
    assert rows["training loader", "samples/s"]["mine/tiny:median"]["value"] > 0
    modules = data["macs:mine/tiny"]["rows"]
    assert {"blocks.0", "stem", "head"} <= {row["module"]["value"] for row in modules}
    assert modules[0]["share"]["value"] == pytest.approx(100 * 256 / macs)
    assert len(data["operators:mine/tiny"]["rows"]) <= 12
    assert "blocks.0" in [row["name"]["value"] for row in data["modules:mine/tiny"]["rows"]]


def test_against_another_the_ratio_is_paired(measure):
    rows, data = measure(vs="mine/tiny model.network.depth=40", what=["macs", "forward"])
    label = "model.network.depth=40"
    exact = rows["forward pass of one sample", "KMACs"]
    assert exact["ratio:median"]["value"] == pytest.approx((160 + 2 * 256) / (160 + 40 * 256))
    faster = rows["forward, batch 4", "samples/s"]
    assert faster["mine/tiny:median"]["value"] > faster[f"{label}:median"]["value"]
    assert faster["ratio:q1"]["value"] > 1.0
    slower = rows["forward, batch 4", "ms"]
    assert slower["ratio:median"]["value"] < 1.0
    assert slower["ratio:q1"]["value"] == pytest.approx(1 / faster["ratio:q3"]["value"], rel=0.2)
    assert any("timed in turn" in note for note in data["summary"]["notes"])


def test_training_step_moves_the_weights_and_forward_does_not(user, monkeypatch):
    from core.config import compose
    from core.engine.launch import build_trainer
    from core.profile.experiment import Subject

    monkeypatch.syspath_prepend(str(user))
    cfg = compose(["experiment=mine/tiny", "runtime.precision=bf16"], config_dir=user / "configs")
    subject = Subject.build(cfg, torch.device("cpu"), build_trainer)
    before = subject.trainer.network.head.weight.clone()
    subject.forward(3)()
    assert torch.equal(before, subject.trainer.network.head.weight)
    assert not subject.trainer.network.training
    subject.train_step(3)()
    assert not torch.equal(before, subject.trainer.network.head.weight)
    assert subject.trainer.network.training
    assert subject.trainer.precision == "bf16"


def test_a_missing_loader_is_a_note_and_an_empty_cell(measure):
    rows, data = measure("train_dataloader=null", what=["loader"])
    assert "mine/tiny:median" not in rows or rows["training loader", "samples/s"]["mine/tiny:median"]["value"] is None
    assert rows["training loader", "samples/s"]["mine/tiny:median"] == {"value": None}
    assert "mine/tiny: loader not measured: mine/tiny has no train_dataloader" in data["summary"]["notes"]


def test_misspelt_words_are_answered(measure):
    with pytest.raises(ConfigError, match="what=forwrd: did you mean 'forward'"):
        measure(what=["forwrd"])
    with pytest.raises(ConfigError, match="vs= is the experiment itself"):
        measure(vs="mine/tiny")
    with pytest.raises(ConfigError, match="mine/tiny"):
        measure(vs="mine/tinny")


def tool(name, *words, cwd=ROOT):
    return forked.run([str(TOOLS / name), *words], cwd, environment())


@pytest.mark.child
def test_standard_output_holds_the_table_and_nothing_else(user):
    words = ["mine/tiny", "--config-dir", "configs", "what=macs,train", "repeats=3", "batch=2", "device=cpu"]
    done = tool("profile.py", *words, "format=json", cwd=user)
    summary, modules = json.loads(done.stdout)
    assert summary["name"] == "summary"
    assert modules["name"] == "macs:mine/tiny"
    assert "profile: train" in done.stderr
    done = tool("profile.py", *words[:3], "what=macs", "format=csv", "output=here/costs.csv", cwd=user)
    assert done.stdout == ""
    text = (user / "here" / "costs.csv").read_text()
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["# profile of mine/tiny"]
    assert ["parameters", "", "818", "", ""] in rows


@pytest.mark.child
@pytest.mark.parametrize("name", ["profile.py", "table.py", "ablate.py"])
def test_help_teaches_and_is_quick(name):
    # Time of the processor: that of the clock is the neighbours' on a busy machine.
    before = sum(os.times()[2:4])
    words = [sys.executable, str(TOOLS / name), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600)
    assert sum(os.times()[2:4]) - before < 2.0
    assert f"python tools/{name} " in done.stdout
    assert "format: str" in done.stdout
    lines = done.stdout.splitlines()
    assert "Options (key=value):" in lines


@pytest.mark.child
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile.py", "stvit/x", "formt=md", "what=macs"], "no such experiment|did you mean|unknown|has no key"),
        (["table.py", "stvit/nothing"], "no table 'stvit/nothing'"),
        (["table.py", "format=html"], "format=html: choose one of text, md, csv, json, png"),
        (["ablate.py"], "missing: experiment=..."),
    ],
)
def test_errors_are_one_line_and_status_two(words, message):
    import re

    done = tool(*words)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.child
def test_the_profile_tool_does_not_hide_pythons_own_profiler():
    """torch.compile imports cProfile, which imports `profile`: beside tools/train.py that name is this tool's file."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cProfile, profile as p; print(p.Profile, p.__file__)"
    done = subprocess.run([sys.executable, "-c", code, str(TOOLS)], capture_output=True, text=True, check=True)
    assert "profile.Profile" in done.stdout
    assert str(TOOLS) not in done.stdout
