"""Several runs in a row: a failed one ends none of the others, and a sweeper gets the figure that the config names."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from tiny_experiment import ROOT

from core.config import compose
from core.engine.launch import run
from core.engine.run.sweep import RunFailed, Sweep
from core.errors import ConfigError, VitrineError
from core.tables.runs import launcher

FAULTS = """
from mmengine.hooks import Hook


class Fails(Hook):
    def __init__(self, how):
        self.how = how

    def before_train(self, runner):
        if self.how == "exit":
            raise SystemExit(3)
        if self.how == "bug":
            raise KeyError("a bug of the user")
        if self.how == "stop":
            from core.config.command.signals import Interrupted
            raise Interrupted("asked to stop")
        if self.how == "ctrl-c":
            raise KeyboardInterrupt
"""


@pytest.fixture
def program(user, tmp_path, monkeypatch, capsys):
    """tools/train.py in this process: (exit status, standard error, what Hydra's sweeper got back)."""
    (user / "myfaults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(Sweep, "folder", None)
    returned, sweep = [], BasicSweeper.sweep

    def remember(self, arguments):
        returned.extend(ret for batch in sweep(self, arguments) for ret in batch)

    monkeypatch.setattr(BasicSweeper, "sweep", remember)

    def call(*words):
        flags = [word for word in words if word.startswith("-")]
        common = [
            "--config-dir",
            str(user / "configs"),
            "experiment=mine/tiny",
            "runtime=cpu",
            "train_cfg.max_epochs=1",
        ]
        overrides = [word for word in words if not word.startswith("-")]
        monkeypatch.setattr(sys, "argv", ["tools/train.py", *flags, *common, "hydra.sweep.dir=sweep", *overrides])
        status = 0
        try:
            runpy.run_path(str(ROOT / "tools/train.py"), run_name="__main__")
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        call.printed = said.out
        return status, said.err, returned

    return call


def records():
    return {(r := json.loads(path.read_text()))["job"]: r for path in Path("sweep").glob("*/job.json")}


def fault(how):
    return f"[{{type: myfaults.Fails, how: {how}}}]"


@pytest.mark.parametrize("batch", ["null", "1"])
def test_a_failing_job_does_not_end_a_multirun(program, batch):
    hooks = ",".join([fault("exit"), fault("bug"), fault("no"), "[{type: myfaults.Fials}]", "[]"])
    status, said, _ = program("-m", f"custom_hooks={hooks}", f"hydra.sweeper.max_batch_size={batch}")
    assert status == 2
    assert {job: record["status"] for job, record in records().items()} == {
        0: "failed", 1: "failed", 2: "finished", 3: "failed", 4: "finished",
    }  # fmt: skip
    report = said[said.index("error: 3 of 5 jobs failed") :].splitlines()
    assert len(report) == 4
    assert "job 0" in report[1] and "how:exit" in report[1] and "SystemExit: 3" in report[1]
    assert "job 1" in report[2] and "KeyError: 'a bug of the user'" in report[2]
    assert "job 3" in report[3] and "did you mean 'Fails'" in report[3]
    for record in records().values():
        if record["status"] == "finished":
            assert json.loads((Path(record["run_dir"]) / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("how", ["stop", "ctrl-c"])
def test_a_stop_ends_the_multirun_and_reports_what_failed_before(program, how):
    hooks = ",".join([fault("bug"), fault(how), fault("no")])
    words = ("-m", f"custom_hooks={hooks}")
    if how == "stop":
        status, said, _ = program(*words)
        assert status != 0 and "asked to stop" in said and "1 of 2 jobs failed" in said
    else:
        with pytest.raises(KeyboardInterrupt):
            program(*words)
    assert {job: record["status"] for job, record in records().items()} == {0: "failed", 1: "stopped"}
    assert json.loads(Path("sweep/runs.json").read_text()) == list(records().values())


def test_a_multirun_without_failures_ends_well_and_returns_its_objectives(program):
    status, said, returned = program("-m", "objective=-val/accuracy", "seed=0,1")
    assert status == 0 and "failed" not in said
    for number, job in enumerate(returned):
        record = records()[number]
        result = json.loads((Path(record["run_dir"]) / "result.json").read_text())
        assert job.return_value == record["objective"] == result["objective"] == -result["val_metrics"]["accuracy"]
        assert result["seed"] == number


def test_the_way_from_a_multiruns_job_to_its_run(program):
    hooks = ",".join([fault("no"), "[{type: myfaults.Fials}]", fault("bug")])
    program("-m", f"custom_hooks={hooks}", "objective=accuracy")
    runs = json.loads(Path("sweep/runs.json").read_text())
    assert [(r["job"], r["status"]) for r in runs] == [(0, "finished"), (1, "failed"), (2, "failed")]
    hows = [next(word for word in r["overrides"] if word.startswith("custom_hooks=")) for r in runs]
    assert ["how:no" in hows[0], "Fials" in hows[1], "how:bug" in hows[2]] == [True] * 3
    for record in runs:  # a failed run has a folder as soon as it has begun
        config = (Path(record["run_dir"]) / "config.yaml").read_text() if "run_dir" in record else ""
        assert ("how: bug" in config) == (record["job"] == 2) and ("how: 'no'" in config) == (record["job"] == 0)
    assert "objective" in runs[0] and "KeyError" in runs[2]["error"]
    lines = program.printed[program.printed.index("runs of the multirun") :].splitlines()
    joined = " ".join(" ".join(lines).split())
    for record in runs:
        assert record.get("run_dir", "") in joined
    assert "runtime=cpu" not in joined  # what all jobs share says nothing
    assert lines[-1] == "Kept in sweep/runs.json."


def test_a_single_run_leaves_no_record_of_a_multirun(program):
    status, _, _ = program()
    assert status == 0 and not Path("sweep").exists() and "multirun" not in program.printed


def test_sweepers_with_rules_of_their_own_and_other_launchers_get_the_exception(monkeypatch):
    monkeypatch.setattr("core.engine.run.sweep.in_multirun", lambda: True)
    basic = "hydra._internal.core_plugins.basic_"
    for sweeper, launch, raises in (
        (f"{basic}sweeper.BasicSweeper", f"{basic}launcher.BasicLauncher", False),
        ("hydra_plugins.hydra_optuna_sweeper.OptunaSweeper", f"{basic}launcher.BasicLauncher", True),
        (f"{basic}sweeper.BasicSweeper", "hydra_plugins.hydra_submitit_launcher.SlurmLauncher", True),
    ):
        job = JobReturn(status=JobStatus.FAILED, _return_value=RunFailed("why"))
        parts = {"sweeper": {"_target_": sweeper}, "launcher": {"_target_": launch}}
        Sweep().on_job_end(OmegaConf.create({"hydra": parts}), job)
        if raises:
            with pytest.raises(RunFailed, match="why"):
                _ = job.return_value
        else:
            assert job.return_value is None


def test_a_bug_in_one_run_of_a_tool_is_one_of_the_projects_errors(user, capsys):
    def fails(cfg):
        raise {"bug": KeyError("depth"), "exit": SystemExit(1), "ours": ConfigError("said")}[cfg.name]

    for name, message in (("bug", "KeyError: 'depth'"), ("exit", "SystemExit: 1"), ("ours", "^said$")):
        with pytest.raises(VitrineError, match=message):
            launcher(fails)(OmegaConf.create({"name": name}))
    assert "in fails" in capsys.readouterr().err  # where a bug is shows


# ---------------------------------------------------------------------- objective
@pytest.fixture
def tiny(user, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        words = ["experiment=mine/tiny", "runtime=cpu", "train_cfg.max_epochs=1", *overrides]
        return run(compose(words, config_dir=user / "configs"))

    return call


TESTED = "test_dataloader={batch_size: 8, dataset: {type: mypoints.Points, count: 9, seed: 7, augment: false}}"
JUDGED = (
    "~val_evaluator",
    "+val_evaluator={type: core.metrics.TorchMetrics, metrics:"
    " {top1: {type: torchmetrics.classification.MulticlassAccuracy, num_classes: 2}}}",
)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("accuracy", lambda r: r["metrics"]["accuracy"]),
        ("-accuracy", lambda r: -r["metrics"]["accuracy"]),
        ("val/accuracy", lambda r: r["val_metrics"]["accuracy"]),
        ("[val/accuracy,-seen]", lambda r: [r["val_metrics"]["accuracy"], -9.0]),
        ("null", lambda r: None),
    ],
)
def test_the_objective_is_the_metric_that_the_config_names(tiny, asked, wanted):
    result = tiny(TESTED, f"objective={asked}")
    assert result["metrics"]["seen"] == 9 and result["val_metrics"]["seen"] == 21
    assert result["objective"] == wanted(result)
    assert result == json.loads((Path(result["run_dir"]) / "result.json").read_text())


def test_the_objective_of_stages_is_the_last_ones(tiny):
    result = tiny("objective=accuracy", "stages=[{name: a}, {name: b}]", "run_dir=staged")
    assert result["objective"] == result["stages"]["b"]["accuracy"]
    assert json.loads(Path("staged/result.json").read_text())["objective"] == result["objective"]


def test_an_unknown_objective_is_refused_before_training_where_it_can_be_known(tiny):
    for words, message in (
        ([*JUDGED, "objective=tpo1"], "objective.*'tpo1': did you mean 'top1'"),
        ([*JUDGED, "objective=val/tpo1"], "'val/tpo1': did you mean 'val/top1'"),
        (["val_dataloader=null", "objective=top1"], "nothing is evaluated"),
        (["objective=3"], "objective=3: the name of a metric"),
        (["objective={metric: a}"], "the name of a metric"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny("run_dir=here", *words)
        assert not Path("here").exists()
    assert tiny(*JUDGED, "objective=top1")["objective"] > 0


def test_an_unknown_objective_that_shows_at_the_end_loses_no_result(tiny):
    with pytest.raises(ConfigError, match="objective: the run has no metric 'acuracy': did you mean 'accuracy'"):
        tiny("run_dir=here", "objective=acuracy")
    assert json.loads(Path("here/result.json").read_text())["metrics"]["seen"] == 21
    assert tiny("run_dir=here", "resume=auto", "objective=accuracy")["objective"] > 0
