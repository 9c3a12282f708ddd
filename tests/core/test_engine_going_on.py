"""Going on with a run: what may change, what extends it, what is an error; and in which folder it goes on."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import compose
from core.config.command.signals import Interrupted
from core.config.fingerprint import fingerprint
from core.engine.launch import run
from core.errors import ConfigError, VitrineError
from core.tables.runs import Results
from tests.killing import assert_same_run, killed_in_phase, weights

CHECKPOINTS = "checkpoint.every_steps=5"
STAGES = (
    "stages=[{name: a, train_cfg: {max_epochs: 1}}, {name: b, train_cfg: {max_epochs: %d}, load_from: {stage: a}},"
    " {name: c, train_cfg: {max_epochs: 1}}]"
)


@pytest.fixture
def composed(user, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    return lambda *words: compose(["experiment=mine/tiny", "runtime=cpu", *words], config_dir=user / "configs")


@pytest.fixture
def tiny(composed, tmp_path, monkeypatch):
    """Runs the tiny experiment (ten steps an epoch) with overrides; returns its result."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(composed("media=null", "visualizer.vis_backends=[{type: core.JsonLines}]", *words))


def state(run_dir):
    return torch.load(find_checkpoint(run_dir), weights_only=True)


def rates(run_dir):
    lines = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def content(folder):
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != "latest"}


# ---------------------------------------------------------------------- resume=auto
def test_auto_finds_the_run_of_this_very_config_and_gives_a_finished_ones_result(tiny, capsys):
    with killed_in_phase(7):
        tiny("train_cfg.max_epochs=1", CHECKPOINTS)
    (folder,) = Path("runs/mine/tiny").glob("2*")
    other = tiny("train_cfg.max_epochs=1", CHECKPOINTS, "seed=1", "resume=auto")
    assert other["run_dir"] != str(folder)
    result = tiny("train_cfg.max_epochs=1", CHECKPOINTS, "resume=auto")
    assert result["run_dir"] == str(folder) and result["resumed_from"].endswith("step_00000005.pt")
    capsys.readouterr()
    assert tiny("train_cfg.max_epochs=1", CHECKPOINTS, "resume=auto") == result
    assert f"already finished in {folder}" in capsys.readouterr().out


def test_auto_in_a_folder_that_is_given_starts_there_and_refuses_another_run(tiny):
    tiny("run_dir=new/deep", "resume=auto", "train_cfg.max_epochs=1")
    before = content("new")
    for word, message in [
        ("model.network.width=8", r"model\.network\.width is 16 there and 8 here"),
        ("seed=1", "seed is 0 there and 1 here"),
        ("train_cfg.max_epochs=2", r"train_cfg\.max_epochs is 1 there and 2 here.*resume=new/deep"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiny("run_dir=new/deep", "resume=auto", "train_cfg.max_epochs=1", word)
    assert content("new") == before


# ---------------------------------------------------------------------- resume=RUN
@pytest.mark.parametrize("word", ["atuo", "runs/mine/tiny/nothing", "first/checkpoints/step_99999999.pt", "empty"])
@pytest.mark.parametrize("where", [[], ["run_dir=elsewhere"]])
def test_what_names_no_run_is_an_error(tiny, word, where):
    tiny("run_dir=first", "train_cfg.max_epochs=1")
    Path("empty").mkdir()
    message = "did you mean auto" if word == "atuo" else "no run" if word == "empty" else "no such run folder"
    with pytest.raises(ConfigError, match=message):
        tiny(f"resume={word}", *where)
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.network.width=8"],
            r"(?s)model\.network\.width is 16 there and 8 here.*resume_changes=\[model\.network\.w",
        ),
        (["seed=1"], r"seed is 0 there and 1 here"),
        (["train_dataloader.batch_size=8"], r"train_dataloader\.batch_size is 4 there and 8 here"),
        (
            ["optim_wrapper.optimizer.lr=0.1", "seed=3"],
            r"(?s)seed is 0 there and 3 here.*lr is 0\.01 there and 0\.1 here",
        ),
        (["train_dataloader.dataset.count=20"], r"train_dataloader\.dataset\.count"),
        (["ema={decay: 0.5}"], r"ema"),
        (["+custom_hooks.x={type: EMAHook}"], r"custom_hooks"),
        (["train_cfg.max_epochs=1"], r"train_cfg\.max_epochs=1, but the run has done 2"),
        (["train_cfg={max_steps: 15}"], r"train_cfg\.max_steps=15, but the run has done 20"),
        (["resume_changes=[model.network.widht]"], r"resume_changes names model\.network\.widht, which neither"),
    ],
)
def test_what_a_run_does_not_go_on_with_is_an_error_and_changes_nothing(tiny, words, message):
    tiny("run_dir=first", "train_cfg.max_epochs=2")
    before = content("first")
    with pytest.raises(ConfigError, match=message):
        tiny("resume=first", "train_cfg.max_epochs=2", *words)
    assert content("first") == before


def test_bookkeeping_machine_and_how_it_is_watched_may_differ(tiny):
    first = tiny("run_dir=first", "train_cfg.max_epochs=1")
    same = tiny("resume=first", "train_cfg.max_epochs=1", "log_every=1", "train_dataloader.num_workers=1", "runs_dir=x")
    assert same == first


def test_a_finished_run_is_extended_with_schedules_of_the_new_length(tiny):
    first = tiny("run_dir=first", "train_cfg.max_epochs=2")
    config = yaml.safe_load(Path("first/config.yaml").read_text())
    result = tiny("resume=first", "train_cfg.max_epochs=4")
    assert result["steps"] == 40 and result["resumed_from"].endswith("step_00000020.pt")
    whole = tiny("run_dir=whole", "train_cfg.max_epochs=4")
    new, old = rates("first"), rates("whole")
    assert {**new, **old}.keys() == new.keys() and all(new[step] == old[step] for step in new if step > 20)
    assert new[18] != old[18]
    # What it was is kept beside, and what changed is said.
    assert json.loads(Path("first/earlier/result_step_00000020.json").read_text()) == first
    assert yaml.safe_load(Path("first/earlier/config_step_00000020.yaml").read_text()) == config
    now = yaml.safe_load(Path("first/config.yaml").read_text())
    assert now["train_cfg"]["max_epochs"] == 4
    assert now["resume_history"] == [{"step": 20, "changes": {"train_cfg.max_epochs": [2, 4]}}]
    # It is not the run that a config of four epochs alone describes.
    assert (
        result["fingerprint"]
        != whole["fingerprint"]
        == fingerprint(yaml.safe_load(Path("whole/config.yaml").read_text()))
    )
    assert tiny("resume=first", "train_cfg.max_epochs=4") == result


def test_an_extension_that_is_killed_goes_on_as_one_that_is_not(tiny):
    schedule = (
        "+param_scheduler=[{type: LinearLR, start_factor: 0.1, by_epoch: false, end: 4},"
        " {type: CosineAnnealingLR, by_epoch: true}]"
    )
    common = [CHECKPOINTS, "~param_scheduler", schedule, "log_every=1"]
    tiny("run_dir=first", "train_cfg.max_epochs=2", *common)
    shutil.copytree("first", "killed")
    tiny("resume=first", "train_cfg.max_epochs=4", *common)
    with killed_in_phase(8):
        tiny("resume=killed", "train_cfg.max_epochs=4", *common)
    assert not Path("killed/result.json").exists()
    tiny("run_dir=killed", "resume=auto", "train_cfg.max_epochs=4", *common)
    assert_same_run(Path("first"), Path("killed"))
    tiny("run_dir=whole", "train_cfg.max_epochs=4", *common)
    new, old = rates("first"), rates("whole")
    assert all(new[step] == pytest.approx(old[step]) for step in new if step > 20) and new[25] > 0.001


def test_a_run_in_the_middle_of_an_epoch_is_extended_there(tiny):
    tiny("run_dir=first", "train_cfg={max_steps: 15}", "param_scheduler=null")
    tiny("resume=first", "train_cfg={max_steps: 30}", "param_scheduler=null")
    tiny("run_dir=whole", "train_cfg={max_steps: 30}", "param_scheduler=null")
    one, other = weights(Path("first")), weights(Path("whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_evaluation_may_change_and_a_finished_run_is_evaluated_anew(tiny):
    first = tiny("run_dir=first", "train_cfg.max_epochs=1")
    other = ["train_cfg.max_epochs=1", "val_dataloader.dataset.count=13", "val_dataloader.batch_size=3"]
    again = tiny("resume=first", *other)
    assert (first["metrics"]["seen"], again["metrics"]["seen"], again["steps"]) == (21, 13, 10)
    assert again["val_metrics"]["seen"] == 13
    assert again["fingerprint"] == tiny("run_dir=whole", *other)["fingerprint"]


def test_named_keys_change_knowingly_and_take_effect(tiny):
    common = ["train_cfg.max_epochs=2", "param_scheduler=null", CHECKPOINTS]
    with killed_in_phase(12):
        tiny("run_dir=first", *common)
    with pytest.raises(ConfigError, match="resume_changes names seeed"):
        tiny("resume=first", *common, "resume_changes=seeed")
    faster = ["optim_wrapper.optimizer.lr=0.5", "optim_wrapper.optimizer.weight_decay=0.2"]
    with pytest.raises(ConfigError, match=r"weight_decay is 0\.05"):
        tiny("resume=first", *common, *faster, "resume_changes=[optim_wrapper.optimizer.lr]")
    result = tiny("resume=first", *common, *faster, "resume_changes=[optim_wrapper.optimizer]")
    assert result["resumed_from"].endswith("step_00000010.pt")
    found = rates("first")
    assert (found[9], found[12], found[20]) == (0.01, 0.5, 0.5)
    assert state("first")["optim"]["param_groups"][0]["weight_decay"] == 0.2


@pytest.mark.parametrize(
    ("killed", "batch", "said"),
    [
        (5, 8, "the epoch goes on at batch 2, with the same sample"),
        (4, 8, "the run goes on at the beginning of epoch 1"),
    ],
)
def test_another_batch_size_goes_on_at_the_same_sample_or_with_the_next_epoch(tiny, killed, batch, said):
    common = ["run_dir=first", "checkpoint.every_steps=1", "train_cfg.max_epochs=2"]
    with killed_in_phase(killed):
        tiny(*common)
    change = [f"train_dataloader.batch_size={batch}", "resume=first", "resume_changes=[train_dataloader.batch_size]"]
    result = tiny(*common, *change)
    assert said in Path("first/run.log").read_text()
    assert result["epochs"] == 2 and result["steps"] == {5: 4 + 3 + 5, 4: 3 + 5}[killed]


def test_more_processes_with_the_same_joint_batch_need_no_leave(tiny, monkeypatch):
    from core.engine.run import start as run_start

    with killed_in_phase(7):
        tiny("run_dir=first", CHECKPOINTS)
    monkeypatch.setattr(run_start, "world_size", lambda: 2)  # what two processes would find
    with pytest.raises(ConfigError, match="batch_size is 4 there and 3 here"):
        tiny("resume=first", CHECKPOINTS, "train_dataloader.batch_size=3")
    result = tiny("resume=first", CHECKPOINTS, "train_dataloader.batch_size=2")  # here one process takes them
    assert result["resumed_from"].endswith("step_00000005.pt")


# ---------------------------------------------------------------------- run_dir=NEW resume=OTHER
def test_a_fork_goes_on_in_a_folder_of_its_own_and_leaves_the_other_alone(tiny):
    tiny("run_dir=first", "train_cfg.max_epochs=2", CHECKPOINTS, "checkpoint.keep_last=4")
    before = content("first")
    longer = ["run_dir=fork", "resume=first", "train_cfg.max_epochs=3"]
    with killed_in_phase(5):
        tiny(*longer)
    result = tiny(*longer)
    assert result["steps"] == 30 and result["run_dir"] == "fork" and max(rates("fork")) == 30 and 3 in rates("fork")
    assert content("first") == before
    half = tiny("run_dir=half", "resume=first/checkpoints/step_00000010.pt", "train_cfg.max_epochs=2")
    assert half["resumed_from"].endswith("step_00000010.pt") and content("first") == before
    one, other = weights(Path("first")), weights(Path("half"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match="run_dir=half holds another run than resume=first"):
        tiny("run_dir=half", "resume=first", "train_cfg.max_epochs=2")
    with pytest.raises(ConfigError, match=r"model\.network\.width"):
        tiny("run_dir=wide", "resume=first", "train_cfg.max_epochs=2", "model.network.width=8")
    assert not Path("wide").exists()


def test_an_older_checkpoint_does_not_go_on_differently_where_there_are_newer_ones(tiny):
    tiny("run_dir=first", "train_cfg.max_epochs=2", CHECKPOINTS, "checkpoint.keep_last=4")
    with pytest.raises(ConfigError, match="give run_dir=NEW"):
        tiny("resume=first/checkpoints/step_00000010.pt", "train_cfg.max_epochs=3")


def test_a_checkpoint_that_lies_in_no_run_begins_one(tiny):
    tiny("run_dir=first", "train_cfg.max_epochs=2", CHECKPOINTS, "checkpoint.keep_last=4")
    shutil.copy("first/checkpoints/step_00000010.pt", "copied.pt")
    with pytest.warns(UserWarning, match="no config"):
        result = tiny("resume=copied.pt", "train_cfg.max_epochs=2")
    assert result["resumed_from"] == "copied.pt" and result["run_dir"].startswith("runs")
    one, other = weights(Path("first")), weights(Path(result["run_dir"]))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- stages
def test_a_stage_is_not_changed_under_one_that_started_from_it(tiny):
    tiny("run_dir=first", STAGES % 1)
    before = content("first")
    with pytest.raises(ConfigError, match=r"'a' is to go on with another train_cfg\.max_epochs.*'b' has started"):
        tiny(
            "resume=first",
            (STAGES % 1).replace("{name: a, train_cfg: {max_epochs: 1}", "{name: a, train_cfg: {max_epochs: 2}"),
        )
    assert content("first") == before


def test_the_last_stage_is_extended_alone(tiny):
    tiny("run_dir=first", STAGES % 1)
    untouched = content("first/stage_0_a") | content("first/stage_2_c")
    result = tiny("resume=first", STAGES % 2)
    assert state("first/stage_1_b")["step"] == 20 and set(result["stages"]) == {"a", "b", "c"}
    assert content("first/stage_0_a") | content("first/stage_2_c") == untouched
    assert yaml.safe_load(Path("first/config.yaml").read_text())["stages"][1]["train_cfg"]["max_epochs"] == 2
    assert Path("first/earlier").is_dir() and not Path("first/stage_0_a/earlier").exists()
    assert tiny("resume=first", STAGES % 2)["steps"] == result["steps"]


def test_in_a_fork_stages_that_started_from_a_changed_one_start_anew(tiny):
    tiny("run_dir=first", STAGES % 1, CHECKPOINTS)
    before = content("first")
    longer = (STAGES % 1).replace("{name: a, train_cfg: {max_epochs: 1}", "{name: a, train_cfg: {max_epochs: 2}")
    with killed_in_phase(10 + 7):  # in b, which begins at its first step
        tiny("run_dir=fork", "resume=first", longer, CHECKPOINTS)
    assert Path("fork/stage_1_b/checkpoints/step_00000005.pt").is_file()
    tiny("run_dir=fork", "resume=first", longer, CHECKPOINTS)
    results = {n: json.loads(Path(f"fork/stage_{n}/result.json").read_text()) for n in ("0_a", "1_b", "2_c")}
    assert [results[n]["steps"] for n in results] == [20, 10, 10]
    assert results["0_a"]["resumed_from"].endswith("first/stage_0_a/checkpoints/step_00000010.pt")
    assert results["2_c"]["run_dir"] == "first/stage_2_c"  # taken over as it is
    first = model_state(find_checkpoint("fork/stage_0_a"))
    assert yaml.safe_load(Path("fork/stage_1_b/config.yaml").read_text())["load_from"]["path"].startswith(
        "fork/stage_0_a"
    )
    assert not torch.equal(
        first["network.head.weight"], model_state(find_checkpoint("first/stage_0_a"))["network.head.weight"]
    )
    assert content("first") == before


def test_a_checkpoint_of_a_stage_is_gone_on_from_in_that_stage_alone(tiny):
    tiny("run_dir=first", STAGES % 1, CHECKPOINTS)
    shutil.copytree("first", "second")
    for name in ("result.json", "stage_1_b/result.json", "stage_2_c/result.json"):
        Path("second", name).unlink()
    Path("second/stage_1_b/checkpoints/step_00000010.pt").unlink()
    tiny("resume=second/stage_1_b/checkpoints/step_00000005.pt", STAGES % 1, CHECKPOINTS)
    found = json.loads(Path("second/stage_1_b/result.json").read_text())["resumed_from"]
    assert found == "second/stage_1_b/checkpoints/step_00000005.pt"
    assert_same_run(Path("first"), Path("second"))


# ---------------------------------------------------------------------- what is in the folder
def test_a_broken_config_of_a_sibling_is_passed_over(tiny):
    with killed_in_phase(7):
        tiny("train_cfg.max_epochs=1", CHECKPOINTS)
    (folder,) = Path("runs/mine/tiny").glob("2*")
    for name, text in {
        "3000": "",
        "3001": "name: mine/tiny\nmodel: {type: [",
        "3002": "- 1",
        "3003": "name: x",
    }.items():
        (folder.parent / name).mkdir()
        (folder.parent / name / "config.yaml").write_text(text)
    (folder.parent / "3004").mkdir()
    (folder.parent / "3004" / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match=r"3001.config\.yaml cannot be read"):
        assert tiny("train_cfg.max_epochs=1", CHECKPOINTS, "resume=auto")["run_dir"] == str(folder)


def test_the_config_is_written_once(tiny):
    with killed_in_phase(7):
        tiny("run_dir=first", "train_cfg.max_epochs=1", CHECKPOINTS)
    stamps = {name: os.stat(f"first/{name}").st_mtime_ns for name in ("config.yaml", "overrides.txt")}
    tiny("run_dir=first", "train_cfg.max_epochs=1", CHECKPOINTS, "resume=auto", "log_every=1")
    assert stamps == {name: os.stat(f"first/{name}").st_mtime_ns for name in stamps}
    assert not list(Path("first").glob(".*"))  # neither temporary files nor the lock


def test_all_checkpoints_damaged_is_an_error(tiny):
    with killed_in_phase(12):
        tiny("run_dir=first", "train_cfg.max_epochs=2", CHECKPOINTS)
    for path in Path("first/checkpoints").glob("step_*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = content("first")
    with pytest.raises(
        ConfigError, match=r"all 2 checkpoints in first/checkpoints are damaged.*remove first/checkpoints"
    ):
        tiny("run_dir=first", "train_cfg.max_epochs=2", CHECKPOINTS, "resume=auto")
    assert content("first") == before
    shutil.rmtree("first/checkpoints")
    assert tiny("run_dir=first", "train_cfg.max_epochs=2", CHECKPOINTS, "resume=auto")["steps"] == 20


def test_a_start_on_a_disk_that_cannot_be_written_is_one_clear_error(tiny, monkeypatch):
    Path("file").write_text("")
    with pytest.raises(VitrineError, match=r"cannot write .*file.*runs_dir="):
        tiny("runs_dir=file/runs")
    with pytest.raises(VitrineError, match=r"cannot write .*file.*run_dir="):
        tiny("run_dir=file/here", "resume=auto")


# ---------------------------------------------------------------------- the last leg
def test_figures_and_seconds_of_all_legs_are_in_the_result(tiny, monkeypatch):
    from core.engine import launch

    whole = tiny("run_dir=whole", "train_cfg.max_epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_result", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            tiny("run_dir=late", "train_cfg.max_epochs=2")
    path = find_checkpoint("late")
    saved = torch.load(path, weights_only=True)
    saved["seconds"] += 1000
    torch.save(saved, path)
    Path("late/checkpoints/index.json").unlink()
    late = tiny("run_dir=late", "train_cfg.max_epochs=2", "resume=auto")
    assert late["resumed_from"].endswith("step_00000020.pt")
    assert late["metrics"] == late["val_metrics"] == whole["metrics"] != {}
    assert 1000 < late["seconds"] < 1000 + 60 + whole["seconds"]


def test_figures_survive_a_stop_right_after_the_last_evaluation(tiny, monkeypatch):
    import mypoints

    common = ["train_cfg={max_steps: 10, val_every_steps: 10}", "checkpoint.every_steps=7"]
    whole = tiny("run_dir=whole", *common)
    evaluate = mypoints.Accuracy.evaluate

    def stopped(self, size):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, size)

    with monkeypatch.context() as patch:
        patch.setattr(mypoints.Accuracy, "evaluate", stopped)
        with pytest.raises(Interrupted):
            tiny("run_dir=late", *common)
    late = tiny("run_dir=late", "resume=auto", *common)
    assert late["metrics"] == late["val_metrics"] == whole["metrics"] != {}
    assert_same_run(Path("whole"), Path("late"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["mkdir", "fsync"])
def test_a_full_or_read_only_disk_at_the_start_is_one_clear_error(tiny, monkeypatch, where, number):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number), *([str(args[0])] if where == "mkdir" else []))

    monkeypatch.setattr(os, where, refuse)
    with pytest.raises(VitrineError, match=f"{os.strerror(number)}.*(Free some space|free there)"):
        tiny("train_cfg.max_epochs=1")


def test_a_log_that_cannot_be_opened_is_one_clear_error(tiny):
    Path("here/run.log").mkdir(parents=True)
    with pytest.raises(VitrineError, match=r"cannot write .*here/run\.log: Is a directory"):
        tiny("run_dir=here")


def test_extended_runs_and_damaged_configs_are_no_evidence_for_tables(tiny, composed):
    tiny("train_cfg.max_epochs=1")
    (folder,) = Path("runs/mine/tiny").glob("2*")
    assert match(composed, 1) is not None
    tiny(f"resume={folder}", "train_cfg.max_epochs=2")
    assert match(composed, 1) is None and match(composed, 2) is None
    (folder / "config.yaml").unlink()  # as if the result alone had been copied
    assert match(composed, 2) is None
    other = Path(tiny("train_cfg.max_epochs=2")["run_dir"])
    (other / "config.yaml").write_text("name: [")
    assert match(composed, 2).path.parent.name == other.name  # its overrides tell


def match(composed, epochs):
    words = ["media=null", "visualizer.vis_backends=[{type: core.JsonLines}]", f"train_cfg.max_epochs={epochs}"]
    return Results("runs", lambda given: composed(*given[1:])).match(composed(*words))
