"""Tools on a run alone: its own config with overrides laid over it, the latest run, the best checkpoint, the stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from core.checkpoint import StateMismatch
from core.checkpoint.run_folder import find_checkpoint
from core.config import compose
from core.engine.commands.evaluation import evaluate
from core.engine.launch import run
from core.engine.run.config import configured, laid_over
from core.errors import ConfigError
from core.tables.ablation import Options as AblationOptions
from core.tables.ablation import ablate
from tools.test import main as evaluate_tool

STORED = {
    "name": "mine/tiny",
    "model": {"type": "mypoints.Classify", "network": {"width": 16, "depth": 2}, "frozen": ["network.stem"]},
    "train_dataloader": {"batch_size": 4, "dataset": {"type": "mypoints.Points", "bad": [1, 2]}},
    "custom_hooks": [{"type": "a.B", "priority": 1}],
    "runtime": {"device": "cuda", "precision": "bf16"},
    "run_dir": "elsewhere",
    "resume": "auto",
    "resume_from": "elsewhere/checkpoints/step_00000001.pt",
    "overrides": ["experiment=mine/tiny"],
}


@pytest.fixture
def place(user, tmp_path, monkeypatch):
    """An empty working folder in which the package of the tiny experiment can be imported."""
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(user, place):
    """Trains the tiny experiment for an epoch; returns the run's folder."""

    def call(*overrides, experiment="mine/tiny"):
        words = [f"experiment={experiment}", "runtime=cpu", "train_cfg.max_epochs=1", *overrides]
        return Path(run(compose(words, config_dir=user / "configs"))["run_dir"])

    return call


def printed(capsys, *words):
    """The figures that tools/test.py prints: all of standard output is JSON."""
    capsys.readouterr()
    evaluate_tool([str(word) for word in words])
    return json.loads(capsys.readouterr().out)


def result(folder):
    return json.loads((Path(folder) / "result.json").read_text())


# ---------------------------------------------------------------------- overrides of a stored config
@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.network.width=32", "model.network.width", 32),
        ("train_dataloader.batch_size=1e1", "train_dataloader.batch_size", 10.0),
        ("model.frozen=[a,'b c']", "model.frozen", ["a", "b c"]),
        ("model.frozen=null", "model.frozen", None),
        ("train_dataloader.dataset={bad: [7]}", "train_dataloader.dataset", {"type": "mypoints.Points", "bad": [7]}),
        ("custom_hooks.0.priority=9", "custom_hooks", [{"type": "a.B", "priority": 9}]),
        ("+model.network.dropout=0.5", "model.network.dropout", 0.5),
        ("++model.network.new.deep=true", "model.network.new", {"deep": True}),
        ("~model.network.depth", "model.network", {"width": 16}),
        ("runtime.precision=fp32", "runtime", {"device": "cuda", "precision": "fp32"}),
        ("model.network.depth=${model.network.width}", "model.network.depth", 16),
        ("model.network.width='a=b, c'", "model.network.width", "a=b, c"),
    ],
)
def test_overrides_of_every_kind_are_laid_over_a_stored_config(override, key, value):
    from core.config import get

    assert get(laid_over(STORED, [override]), key) == value


def test_a_group_is_replaced_and_what_belongs_to_the_run_is_left_behind():
    cfg = laid_over(STORED, ["runtime=cpu"])
    assert cfg["runtime"]["device"] == "cpu" and cfg["runtime"]["precision"] == "fp32"
    assert cfg["run_dir"] is None and cfg["resume"] is False and "resume_from" not in cfg
    assert cfg["overrides"] == ["experiment=mine/tiny", "runtime=cpu"]
    assert laid_over(STORED, ["runtime=cpu", "runtime.threads=3"])["runtime"]["threads"] == 3
    assert laid_over(STORED, ["logger=wandb"])["visualizer"]["type"] == "mmengine.Visualizer"
    assert laid_over(STORED, ["run_dir=here"])["run_dir"] == "here"


def test_a_folder_of_runs_on_another_machine_is_not_asked_for(tmp_path):
    assert laid_over({**STORED, "runs_dir": "/scratch/of/a/cluster"}, [])["runs_dir"] == "runs"
    assert laid_over({**STORED, "runs_dir": "elsewhere"}, [])["runs_dir"] == "elsewhere"
    assert laid_over({**STORED, "runs_dir": str(tmp_path)}, [])["runs_dir"] == str(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.network.widht=3", "has a key 'model.network.widht': did you mean 'model.network.width'"),
        ("custom_hooks.1.priority=9", "has a key 'custom_hooks.1.priority'"),
        ("~model.network.heads", "has a key 'model.network.heads'"),
        ("model.network.width=1,2", "a sweep"),
        ("model.network.width=[1", "cannot be read"),
        ("runtime=cpuu", "cpu"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        laid_over(STORED, [override])


# ---------------------------------------------------------------------- a run alone
def test_a_run_needs_no_experiment_and_keeps_its_overrides(trained, capsys):
    folder = trained("model.network.width=8", "runs_dir=runs")
    figures = result(folder)["val_metrics"]
    assert printed(capsys, f"checkpoint={folder}") == figures
    assert printed(capsys, f"checkpoint={folder}/checkpoints/step_00000010.pt") == figures
    half = printed(capsys, f"checkpoint={folder}", "val_dataloader.dataset.count=11", "runtime=cpu", "output=f.json")
    assert half["seen"] == 11 == json.loads(Path("f.json").read_text())["seen"]
    with pytest.raises(ConfigError, match=r"'val_dataloader.dataset.cuont'.*'val_dataloader.dataset.count'"):
        printed(capsys, f"checkpoint={folder}", "val_dataloader.dataset.cuont=11")
    with pytest.raises(ConfigError, match="split=train: test or val"):
        printed(capsys, f"checkpoint={folder}", "split=train")
    assert not (folder.parent / "evaluations").exists() and Path("runs/evaluations/mine/tiny").is_dir()


def test_an_experiment_that_is_named_is_built_instead_and_what_differs_is_said(user, trained, capsys):
    folder = trained("model.network.width=8", "runs_dir=runs")
    own = [f"config_dir={user / 'configs'}", f"checkpoint={folder}", "runtime=cpu"]
    with pytest.raises(StateMismatch, match=r"stem\.weight: the model has \(16, 8\)"):
        printed(capsys, *own, "experiment=mine/tiny")
    said = capsys.readouterr().err
    assert "was trained otherwise (model.network.width: 8 there, 16 here); without experiment= its own config" in said
    assert printed(capsys, *own, "experiment=mine/tiny", "model.network.width=8") == result(folder)["val_metrics"]
    text = (user / "configs/experiment/mine/tiny.yaml").read_text().replace("mine/tiny", "mine/other")
    (user / "configs/experiment/mine/other.yaml").write_text(text.replace("count: 21", "count: 9"))
    other = printed(capsys, *own, "experiment=mine/other", "model.network.width=8")
    assert other["seen"] == 9
    with pytest.raises(ConfigError, match="no such experiment"):
        printed(capsys, *own, "experiment=mine/tinny")


def test_a_file_outside_of_a_run_needs_its_experiment(user, trained, capsys, place):
    folder = trained("runs_dir=runs")
    find_checkpoint(folder).rename(place / "copied.pt")
    with pytest.raises(ConfigError, match=r"copied\.pt does not lie in a run's folder.*name its experiment="):
        printed(capsys, "checkpoint=copied.pt")
    words = [f"config_dir={user / 'configs'}", "experiment=mine/tiny", "runtime=cpu"]
    assert printed(capsys, "checkpoint=copied.pt", *words) == result(folder)["val_metrics"]
    with pytest.raises(ConfigError, match="no weights file nothing"):
        printed(capsys, "checkpoint=nothing.pt", *words)
    (folder / "config.yaml").write_text("name: mine/ti")  # half-written
    (folder / "checkpoints" / "step_00000010.pt").symlink_to(place / "copied.pt")
    with pytest.raises(ConfigError, match="name its experiment="):
        printed(capsys, f"checkpoint={folder}")
    assert printed(capsys, f"checkpoint={folder}", *words) == result(folder)["val_metrics"]


@pytest.mark.parametrize(
    "word", ["chekpoint=x", "inptu=a.png", "+splti=val", "++bset=true", "~otuput", "model_network=3"]
)
def test_a_word_that_is_neither_option_nor_key_is_refused_by_both_tools(trained, capsys, word):
    from tools.infer import main as infer_tool

    folder = trained("runs_dir=runs")
    with pytest.raises(ConfigError, match=r"neither an option of this tool .* nor a key of configs") as caught:
        evaluate_tool([f"checkpoint={folder}", word])
    near = {"chekpoint": "checkpoint", "+splti": "split", "++bset": "best", "~otuput": "output"}
    assert f"'{near.get(word.partition('=')[0], '')}" in str(caught.value)
    with pytest.raises(ConfigError, match="neither an option of this tool") as caught:
        infer_tool([f"checkpoint={folder}", "output=out", word])
    assert word != "inptu=a.png" or "did you mean 'input'" in str(caught.value)
    assert not Path("out").exists()


# ---------------------------------------------------------------------- the latest
def test_latest_is_the_newest_run_that_was_trained_whatever_else_lies_there(user, trained, capsys, place):
    first = trained("runs_dir=runs")
    assert os.readlink("runs/mine/tiny/latest") == first.name
    second = trained("runs_dir=runs", "model.network.width=8")
    assert Path("runs/mine/tiny/latest").resolve() == second.resolve()
    words = [f"config_dir={user / 'configs'}", "experiment=mine/tiny", "checkpoint=latest"]
    assert (
        printed(capsys, *words) == printed(capsys, "checkpoint=runs/mine/tiny/latest") == result(second)["val_metrics"]
    )

    with pytest.raises(ConfigError):  # a start that fails is the last one started, and has no checkpoint
        trained("runs_dir=runs", "model.frozen=[network.nothing]")
    assert Path("runs/mine/tiny/latest").resolve() != second.resolve()
    assert find_checkpoint("runs/mine/tiny/latest").parents[1].name == second.name

    text = (user / "configs/experiment/mine/tiny.yaml").read_text()
    part = "components:\n  depth: {key: model.network.depth, default: 2, alternatives: [1]}\n"
    (user / "configs/experiment/mine/switched.yaml").write_text(text + part)
    options = AblationOptions(
        "mine/switched", seeds=1, runs_dir="runs", config_dir=str(user / "configs"), metric=["seen"]
    )
    ablate(options, ["runtime=cpu", "train_cfg.max_epochs=1"])
    assert len(list(Path("runs/mine/tiny").glob("2*/checkpoints"))) == 3, "two of ours, one of the ablation"
    assert find_checkpoint("runs/mine/tiny/latest").parents[1].name == second.name
    assert printed(capsys, *words) == result(second)["val_metrics"]

    Path("runs/mine/tiny/latest").unlink()  # a file system without links
    assert find_checkpoint("runs/mine/tiny/latest").parents[1].name == second.name
    with pytest.raises(ConfigError, match="name it with experiment="):
        printed(capsys, "checkpoint=latest")
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        printed(capsys, "checkpoint=runs/mine/tinny/latest")
    Path("empty/mine/tiny").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no whole checkpoint at .*latest"):
        printed(capsys, *words, "runs_dir=empty")
    with pytest.raises(ConfigError, match="perhaps meant by 'chekpoint=latest'"):
        printed(capsys, "chekpoint=latest")


def test_latest_follows_a_run_that_goes_on_and_leaves_own_folders_alone(trained, place):
    first = trained("runs_dir=runs", "run_dir=null")
    link = Path("runs/mine/tiny/latest")
    link.unlink()
    link.mkdir()
    second = trained("runs_dir=runs", "seed=1")
    assert link.is_dir() and not link.is_symlink() and not list(link.parent.glob(".latest*"))
    link.rmdir()
    trained("run_dir=apart")
    assert not link.exists(), "a folder that was chosen is no run of the list"
    assert find_checkpoint(link).parents[1].name == second.name
    trained("runs_dir=runs", f"resume={first}")
    assert find_checkpoint(link).parents[1].name == first.name


def test_runs_of_one_second_are_told_apart(place):
    home = Path("runs/mine/tiny")
    for name in ("2026-01-31_12-00-00", "2026-01-31_12-00-00_2", "2026-01-31_12-00-00_10", "notes"):
        (home / name / "checkpoints").mkdir(parents=True)
        torch.save({"weight": torch.ones(1)}, home / name / "checkpoints" / "step_00000001.pt")
        (home / name / "config.yaml").write_text(yaml.safe_dump({"model": {"type": "a.B"}}))
    assert find_checkpoint(home / "latest").parents[1].name == "2026-01-31_12-00-00_10"
    (home / "2026-01-31_12-00-00_10" / "checkpoints" / "step_00000001.pt").write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="damaged"):
        assert find_checkpoint(home / "latest").parents[1].name == "2026-01-31_12-00-00_2"


# ---------------------------------------------------------------------- the best
def test_the_best_is_found_by_the_runs_metric_or_refused(trained, capsys):
    chosen = ["checkpoint.metric=accuracy", "checkpoint.keep_last=null", "train_cfg.max_epochs=3"]
    folder = trained("runs_dir=runs", *chosen, "optim_wrapper.optimizer.lr=0.3")
    index = json.loads((folder / "checkpoints" / "index.json").read_text())["checkpoints"]
    best = max(index.items(), key=lambda item: (item[1]["metrics"]["accuracy"], item[0]))
    _, file = configured(str(folder), [], best=True)
    assert file.name == best[0]
    assert printed(capsys, f"checkpoint={folder}", "best=true")["accuracy"] == best[1]["metrics"]["accuracy"]
    worst = min(index.items(), key=lambda item: (item[1]["metrics"]["accuracy"], item[0]))
    _, file = configured(str(folder), ["checkpoint.direction=lower"], best=True)
    assert index[file.name]["metrics"]["accuracy"] == worst[1]["metrics"]["accuracy"]

    plain = trained("runs_dir=runs")
    with pytest.raises(ConfigError, match=r"without checkpoint\.metric; set checkpoint\.metric=NAME"):
        printed(capsys, f"checkpoint={plain}", "best=true")
    for said in (["best=true", "checkpoint.metric=top1"], ["best=top1", "checkpoint.metric=[accuracy, top1]"]):
        with pytest.raises(ConfigError, match=r"judged by.* top1 \(kept there: accuracy"):
            printed(capsys, f"checkpoint={folder}", *said)
    with pytest.raises(ConfigError, match="no best checkpoint by 'top1'"):
        printed(capsys, f"checkpoint={folder}", "best=top1")


# ---------------------------------------------------------------------- stages
STAGES = """
stages:
  - name: first
  - name: second
    load_from: {stage: first, strict: false}
    model: {network: {depth: 1}}
  - name: third
    load_from: null
    model: {network: {depth: 3, width: 8}}
    val_dataloader: {dataset: {count: 13}}
"""


@pytest.fixture
def staged(user):
    text = (user / "configs/experiment/mine/tiny.yaml").read_text().replace("mine/tiny", "mine/staged")
    (user / "configs/experiment/mine/staged.yaml").write_text(text + STAGES)


def test_a_checkpoint_of_stages_is_used_with_its_own_model(user, trained, staged, capsys, place):
    folder = trained("runs_dir=runs", experiment="mine/staged")
    parts = [folder / f"stage_{name}" for name in ("0_first", "1_second", "2_third")]
    named = [f"config_dir={user / 'configs'}", "experiment=mine/staged", "runtime=cpu"]
    for words in ([], named):
        assert printed(capsys, f"checkpoint={folder}", *words) == result(parts[2])["val_metrics"]
        assert printed(capsys, f"checkpoint={folder}", *words)["seen"] == 13
        for part in parts:
            assert printed(capsys, f"checkpoint={part}", *words) == result(part)["val_metrics"]
        name = "stage=second"
        assert printed(capsys, f"checkpoint={folder}", name, *words) == result(parts[1])["val_metrics"]
        with pytest.raises(ConfigError, match="stage=secnd"):
            printed(capsys, f"checkpoint={folder}", "stage=secnd", *words)
    assert printed(capsys, "checkpoint=runs/mine/staged/latest", "stage=first") == result(parts[0])["val_metrics"]

    (user / "configs/experiment/mine/again.yaml").write_text(
        (user / "configs/experiment/mine/staged.yaml").read_text().replace("mine/staged", "mine/again")
    )
    again = [named[0], "experiment=mine/again", "runtime=cpu"]  # by the folder, of another experiment with stages
    assert printed(capsys, f"checkpoint={parts[1]}", *again) == result(parts[1])["val_metrics"]
    for part in parts:  # a copied file tells its stage by names and shapes
        torch.save(torch.load(find_checkpoint(part), weights_only=True)["model"], place / "copied.pt")
        assert printed(capsys, "checkpoint=copied.pt", *named) == result(part)["val_metrics"]
    network = {k.removeprefix("network."): v for k, v in torch.load(place / "copied.pt", weights_only=True).items()}
    torch.save(network, place / "bare.pt")
    assert printed(capsys, "checkpoint=bare.pt", *named) == result(parts[2])["val_metrics"]
    cfg = compose(named[1:], config_dir=user / "configs")
    assert evaluate(cfg, parts[0]) == result(parts[0])["val_metrics"]
    with pytest.raises(ConfigError, match=r"no stage 'secnd': did you mean 'second'\? \(stages: first, second, third"):
        printed(capsys, "checkpoint=bare.pt", "stage=secnd", *named)


def test_a_file_that_fits_several_stages_asks_for_the_stage(user, trained, capsys, place):
    text = (user / "configs/experiment/mine/tiny.yaml").read_text().replace("mine/tiny", "mine/twins")
    stages = "stages:\n  - {name: one}\n  - {name: two, model: {frozen: [network.stem]}}\n"
    (user / "configs/experiment/mine/twins.yaml").write_text(text + stages)
    folder = trained("runs_dir=runs", experiment="mine/twins")
    torch.save(torch.load(find_checkpoint(folder), weights_only=True)["model"], place / "copied.pt")
    words = ["checkpoint=copied.pt", f"config_dir={user / 'configs'}", "experiment=mine/twins", "runtime=cpu"]
    with pytest.raises(ConfigError, match=r"fits several stages: choose one with stage= \(one, two\)"):
        printed(capsys, *words)
    assert printed(capsys, *words, "stage=two") == result(folder / "stage_1_two")["val_metrics"]


def test_many_stages_are_counted_by_number(place):
    for index in (0, 2, 10):
        folder = Path(f"run/stage_{index}_part{index}/checkpoints")
        folder.mkdir(parents=True)
        torch.save({"weight": torch.ones(1)}, folder / "step_00000001.pt")
    Path("run/stage_11_unborn/checkpoints").mkdir(parents=True)
    assert find_checkpoint("run").parents[1].name == "stage_10_part10"
