"""The command line: quick answers, Hydra's own features, and errors that name the nearest existing thing."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from tiny_experiment import ROOT, environment

from core.cli import parse
from core.config import compose, experiments, merge
from core.errors import ConfigError

TOOLS = ("train", "test", "infer", "table", "ablate", "profile", "convert", "prepare_data")


def call(*words, cwd=ROOT, env=None):
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120, env=env or environment()
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_help_teaches_by_example_without_heavy_imports(tool):
    done = call("-X", "importtime", f"tools/{tool}.py", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python tools/{tool}.py" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not imported & {"torch", "timm", "mmengine", "matplotlib", "torchvision", "torchmetrics"}


@pytest.mark.parametrize("flag", ["--help", "--list"])
def test_answers_within_two_seconds(flag):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert call("tools/train.py", flag).returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2, seconds


def test_list_prints_every_experiment_with_its_purpose(user):
    wide = {**environment(), "COLUMNS": "300"}
    done = call(str(ROOT / "tools/train.py"), "--list", "--config-dir", "configs", cwd=user, env=wide)
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["mine/tiny"] == "A tiny classifier of points."
    assert set(experiments()) < set(lines)
    assert all(lines.values())


def test_cfg_job_prints_the_resolved_runner_config(user):
    done = call(
        str(ROOT / "tools/train.py"), "--config-dir", "configs", "experiment=mine/tiny", "--cfg", "job", cwd=user
    )
    assert "type: mypoints.Classify" in done.stdout and "max_epochs: 3" in done.stdout


def test_multirun_runs_one_after_the_other(user):
    done = call(
        str(ROOT / "tools/train.py"), "-m", "--config-dir", "configs", "experiment=mine/tiny", "runtime=cpu",
        "runs_dir=swept", "train_cfg.max_epochs=1", "seed=0,1", cwd=user,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((user / "swept" / "mine" / "tiny").glob("*/result.json"))) == 2


def test_completion_knows_groups_and_experiments():
    line = "tools/train.py experiment=stvit/"
    env = {**environment(), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = call("tools/train.py", "-sc", "query=bash", env=env)
    assert "experiment=stvit/digits" in done.stdout.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=stvit/digit"], "did you mean stvit/digits"),
        (["experiment=mine/tiny", "sed=1"], "did you mean seed"),
        (["experiment=mine/tiny", "model.network.widht=3"], "did you mean model.network.width"),
        (["experiment=mine/tiny", "model.type=mypoints.Classfy"], "did you mean 'Classify'"),
        (["experiment=mine/tiny", "runtime=cpuu"], "did you mean cpu"),
        (["experiment=mine/tiny", "seed==1"], "seed"),
        (
            ["experiment=mine/tiny", "model.network=[a,b]"],
            "'model.network' holds a mapping and was given a list; to replace it whole, remove it first: "
            "'~model.network' '+model.network=[a,b]'",
        ),
        (["experiment=mine/tiny", "~train_cfg", "+train_cfg=[1]", "sed=1"], "did you mean seed"),
        ([], "choose an experiment"),
    ],
)
def test_typos_end_at_once_with_the_nearest_names(user, words, message):
    before = sorted((user / "runs").rglob("*"))
    done = call(str(ROOT / "tools/train.py"), "--config-dir", "configs", *words, cwd=user)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    assert sorted((user / "runs").rglob("*")) == before, "nothing has been built or written"


def test_compose_is_what_the_command_line_gives(user):
    cfg = compose(["experiment=mine/tiny", "model.network.width=4"], config_dir=user / "configs")
    assert cfg.model.network.width == 4 and cfg.overrides[-1] == "model.network.width=4"


def test_a_list_for_a_mapping_and_the_reverse_say_how_to_replace_it():
    for held, words in (("model.network", ["model.network=[1]"]), ("model", ["seed=1", "++model=[1]"])):
        with pytest.raises(ConfigError, match=f"'{held}' holds a mapping and was given a list"):
            compose(["experiment=stvit/digits", *words])
    with pytest.raises(ConfigError, match=r"'model\.classes' holds a list and was given a mapping.*'~model\.classes'"):
        compose(["experiment=stvit/digits", "model.classes={a: 1}"])
    cfg = compose(["experiment=stvit/digits", "~model.classes", "+model.classes={a: 1}"])
    assert cfg.model.classes == {"a": 1}


def test_slurm_and_fsdp_configs_compose():
    assert compose(["runtime=slurm"]).runtime.precision == "bf16"
    assert compose(["runtime=fsdp"]).runtime.fsdp.reshard_after_forward is True
    done = call("tools/train.py", "runtime=slurm", "--cfg", "hydra")
    assert "submitit_launcher.SlurmLauncher" in done.stdout


def test_merge_replaces_a_mapping_of_another_type_whole():
    base = {"a": {"type": "X", "x": 1}, "b": {"c": 1, "d": 2}, "l": [1]}
    assert merge(base, {"a": {"type": "Y", "y": 2}, "b": {"c": 3}, "l": [2]}) == {
        "a": {"type": "Y", "y": 2},
        "b": {"c": 3, "d": 2},
        "l": [2],
    }
    assert base["b"]["c"] == 1


@dataclass
class Options:
    count: int
    fast: bool = False
    names: list[str] | None = None
    share: float | None = None


def test_options_come_in_every_spelling():
    words = ["--count", "3", "--fast", "names=a,b", "--share=0.5", "x.y=1"]
    options, rest = parse(words, Options, doc="", overrides=True)
    assert options == Options(3, True, ["a", "b"], 0.5) and rest == ["x.y=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["count=x"], "count=x: not a valid int"),
        (["cuont=1"], "did you mean count"),
        ([], "missing: count="),
        (["count=1", "fast=maybe"], "fast=maybe"),
    ],
)
def test_options_that_cannot_be_meant(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words, Options, doc="")


def test_no_tool_needs_the_working_directory_to_be_the_repository(tmp_path):
    done = call(str(ROOT / "tools/train.py"), "--list", cwd=tmp_path, env={**environment(), "PYTHONPATH": ""})
    assert done.returncode == 0 and os.listdir(tmp_path) == []
