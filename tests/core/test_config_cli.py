"""The command line: quick answers, Hydra's own features, and errors that name the nearest existing thing."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from tiny_experiment import ROOT, environment, train

from core.config.command.cli import parse
from core.config.composition import command_line, compose, experiments, explain_overrides, merge, to_dict
from core.engine.keys.check import stage_config
from core.errors import ConfigError
from tests import forked

TOOLS = ("train", "test", "infer", "table", "ablate", "profile", "convert", "find_lr", "prepare_data")


def call(*words, cwd=ROOT, env=None):
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=600, env=env or environment()
    )


@pytest.mark.child
@pytest.mark.parametrize("tool", TOOLS)
def test_help_teaches_by_example_without_heavy_imports(tool):
    done = call("-X", "importtime", f"tools/{tool}.py", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python tools/{tool}.py" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not imported & {"torch", "timm", "mmengine", "matplotlib", "torchvision", "torchmetrics"}


@pytest.mark.child
@pytest.mark.parametrize("flag", ["--help", "--list"])
def test_answers_at_once(flag):
    # Time of the processor: that of the clock is the neighbours' on a busy machine.
    spent = [sum(os.times()[2:4])]
    for _ in range(3):
        assert call("tools/train.py", flag).returncode == 0
        spent.append(sum(os.times()[2:4]))
    assert min(after - before for before, after in itertools.pairwise(spent)) < 0.6, spent


@pytest.mark.child
def test_list_prints_every_experiment_with_its_purpose(user):
    wide = {**environment(), "COLUMNS": "300"}
    done = call(str(ROOT / "tools/train.py"), "--list", "--config-dir", "configs", cwd=user, env=wide)
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["mine/tiny"] == "A tiny classifier of points."
    assert set(experiments()) < set(lines)
    assert all(lines.values())


@pytest.mark.child
def test_cfg_job_prints_the_resolved_runner_config(user):
    done = call(
        str(ROOT / "tools/train.py"), "--config-dir", "configs", "experiment=mine/tiny", "--cfg", "job", cwd=user
    )
    assert "type: mypoints.Classify" in done.stdout and "max_epochs: 3" in done.stdout


@pytest.mark.child
def test_multirun_runs_one_after_the_other(user):
    train(user, "-m", "runs_dir=swept", "train_cfg.max_epochs=1", "seed=0,1")
    runs = {
        path.resolve() for path in (user / "swept" / "mine" / "tiny").glob("*/result.json")
    }  # `latest` is one of them
    assert len(runs) == 2


@pytest.mark.child
def test_completion_knows_groups_and_experiments():
    line = "tools/train.py experiment=stvit/"
    env = {**environment(), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = call("tools/train.py", "-sc", "query=bash", env=env)
    assert "experiment=stvit/digits" in done.stdout.split()


@pytest.mark.child
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
        (["--experiment=mine/tiny"], "error: --experiment: keys are given without dashes: experiment=mine/tiny"),
    ],
)
def test_typos_end_at_once_with_the_nearest_names(user, words, message):
    before = sorted((user / "runs").rglob("*"))
    done = forked.run([str(ROOT / "tools/train.py"), "--config-dir", "configs", *words], user, environment())
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-1500:]
    assert "Traceback" not in done.stderr and "HYDRA_FULL_ERROR" not in done.stderr
    assert done.stderr.count("error") == 1 and len(done.stderr.splitlines()) == 1, (
        "Hydra's words do not come beside ours"
    )
    assert sorted((user / "runs").rglob("*")) == before, "nothing has been built or written"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["+vars.a=1", "vars.a=2", "sed=1"], "sed=1"),
        (["~optim_wrapper", "+optim_wrapper={a: 1}", "optim_wrapper.a=2", "optim_wrapper.b=2"], "optim_wrapper.b=2"),
        (["seed=1,2", "~nope"], "~nope"),
    ],
)
def test_the_override_that_is_wrong_is_named_and_not_one_before(words, named):
    assert explain_overrides(["experiment=stvit/digits", *words]).startswith(f"{named}: the config has no key")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experiment", "mine/tiny"], "--experiment: keys are given without dashes: experiment=mine/tiny"),
        (["experiment=mine/tiny", "--seed", "3"], "--seed: keys are given without dashes: seed=3"),
        (["--model.network.width=3"], "keys are given without dashes: model.network.width=3"),
        (["--fast"], "there is no flag --fast"),
    ],
)
def test_flags_that_are_meant_as_keys(words, message):
    with pytest.raises(ConfigError, match=message):
        command_line(words)


def test_overrides_behind_a_flag_go_to_the_others():
    words = ["experiment=a", "--config-dir", "b=c", "seed=1", "-m", "seed=2"]
    assert command_line(words) == (["--config-dir", "b=c", "-m"], ["experiment=a", "seed=1", "seed=2"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mine/tiny", "did you mean experiment=mine/tiny"),
        ("stvit/digit", "did you mean experiment=stvit/digits"),
        ("fast", "'fast' is not KEY=VALUE"),
        ("model.network={widht: 3}", "no key 'model.network.widht'; did you mean model.network.width"),
        ("model={network: {depth: 1, widht: 3}}", "no key 'model.network.widht'"),
    ],
)
def test_words_that_hydra_cannot_use_are_answered(user, word, message):
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=mine/tiny", word], config_dir=user / "configs")


def test_a_folder_of_configs_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no folder of configs 'nowhere'"):
        compose(["seed=1"], config_dir="nowhere")


def test_a_config_file_that_is_not_yaml_is_named_with_its_line(user, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text("# @package _global_\nname: a\nmodel: {type: [}\n")
    with pytest.raises(ConfigError, match=r"(?s)bad\.yaml.*line 3"):
        compose(["experiment=bad"], config_dir=tmp_path)


@pytest.mark.child
@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["train_cfg={max_steps: 10}"], {"max_epochs": None, "max_steps": 10, "val_every_epochs": 1}),
        (["train_cfg.max_steps=10"], {"max_epochs": None, "max_steps": 10}),
        (["train_cfg.val_every_steps=4"], {"max_epochs": 3, "val_every_epochs": None, "val_every_steps": 4}),
        (["train_cfg.max_epochs=null", "+train_cfg.max_steps=10"], {"max_epochs": None, "max_steps": 10}),
        (["train_cfg={max_epochs: 7}"], {"max_epochs": 7, "val_every_epochs": 1}),
        (["train_cfg={max_epochs: 7, max_steps: 9}"], {"max_epochs": 7, "max_steps": 9}),
    ],
)
def test_a_length_in_steps_takes_the_place_of_one_in_epochs(user, overrides, wanted):
    cfg = compose(["experiment=mine/tiny", *overrides], config_dir=user / "configs")
    assert {key: cfg.train_cfg.get(key) for key in wanted} == wanted
    assert compose([*cfg.overrides], config_dir=user / "configs") == cfg
    _, shown = command_line(["experiment=mine/tiny", "--cfg", "job", *overrides], user / "configs")
    assert compose(shown, config_dir=user / "configs").train_cfg == cfg.train_cfg


def test_a_stages_length_takes_the_place_of_the_experiments(user):
    stages = "stages=[{name: a, train_cfg: {max_steps: 10}}, {name: b}]"
    cfg = to_dict(compose(["experiment=mine/tiny", stages], config_dir=user / "configs"))
    first, second = (stage_config(cfg, stage)["train_cfg"] for stage in cfg["stages"])
    assert first["max_epochs"] is None and first["max_steps"] == 10
    assert second["max_epochs"] == 3 and "max_steps" not in second


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


@pytest.mark.child
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


@pytest.mark.child
def test_no_tool_needs_the_working_directory_to_be_the_repository(tmp_path):
    done = call(str(ROOT / "tools/train.py"), "--list", cwd=tmp_path, env={**environment(), "PYTHONPATH": ""})
    assert done.returncode == 0 and os.listdir(tmp_path) == []


def test_a_runtime_by_its_former_name_warns_and_is_the_same():
    words = ["experiment=stvit/digits"]
    with pytest.warns(FutureWarning, match="runtime=ddp is now runtime=bf16_compiled"):
        former = compose([*words, "runtime=ddp"])
    present = compose([*words, "runtime=bf16_compiled"])
    assert former.runtime == present.runtime
    assert (present.runtime.precision, present.runtime.compile, present.runtime.channels_last) == ("bf16", True, True)
