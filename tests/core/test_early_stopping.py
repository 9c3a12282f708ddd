"""A run that no longer improves ends early, as a run ends: saved, tested, resumed exactly, with several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
from mmengine.hooks import Hook
from tiny_experiment import train

from core.checkpoint import CheckpointStore
from core.errors import ConfigError

TEST = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"


class Course:
    """Figures that are given, one for every evaluation of the process; the course of a resumed run goes on."""

    values: ClassVar[list[float]] = []
    calls: ClassVar[int] = 0

    def __init__(self):
        self.dataset_meta = None

    def process(self, data_batch, data_samples):
        pass

    def evaluate(self, size):
        Course.calls += 1
        return {"score": Course.values[Course.calls - 1]}


def words(patience, **options):
    given = ", ".join(f"{key}: {value}" for key, value in {"patience": patience, **options}.items())
    return (
        "val_evaluator={type: test_early_stopping.Course}",
        f"+custom_hooks.stop={{type: core.EarlyStopping, {given}}}",
        "train_cfg.max_epochs=6",  # of 10 steps
        "runtime.sanity_batches=0",  # would take the first figure
    )


def follow(values):
    Course.values, Course.calls = values, 0


@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([0.1, 0.5, 0.4, 0.5, 0.3, 0.9], {"patience": 2}, 4),  # as good as the best is not better
        ([0.1, 0.5, 0.4, 0.6, 0.3, 0.2], {"patience": 2}, 6),  # waits in a row only; the last step is the last anyway
        ([5.0, 4.0, 4.5, 4.2, 3.0, 2.0], {"patience": 2, "direction": "lower"}, 4),
        ([0.1, 0.5, 0.55, 0.58, 0.9, 0.9], {"patience": 2, "min_delta": 0.1}, 4),
        ([math.nan, 0.1, math.nan, 0.05, 0.2, 0.3], {"patience": 2}, 4),
    ],
)
def test_a_run_ends_when_its_figure_no_longer_improves(tiny, values, options, epochs):
    follow(values)
    result = tiny(*words(**{"metric": "score", **options}))
    assert (result["status"], result["epochs"], result["steps"]) == ("finished", epochs, 10 * epochs)
    if epochs == 6:
        assert result["stopped_early"] is None
    else:
        assert "score has not improved on" in result["stopped_early"] and "2 evaluations" in result["stopped_early"]
    assert json.loads((Path(result["run_dir"]) / "result.json").read_text())["stopped_early"] == result["stopped_early"]
    assert Course.calls == epochs  # the last state is not evaluated twice


def test_it_stops_inside_an_epoch_and_the_best_is_tested(tiny):
    follow([0.1, 0.9, 0.2, 0.3])
    result = tiny(
        *words(2),
        TEST,
        "+test_evaluator={type: mypoints.Accuracy}",
        "train_cfg.val_every_epochs=null",
        "train_cfg.val_every_steps=4",
        "checkpoint.metric=score",
        "evaluate=best",
    )
    assert result["steps"] == 16 and result["epochs"] == 1 and result["stopped_early"]
    assert result["val_metrics"] == {"score": 0.9} and result["metrics"]["seen"] == 9
    assert CheckpointStore(Path(result["run_dir"]) / "checkpoints", metric="score").best().name == "step_00000008.pt"


def test_a_resumed_run_stops_where_an_uninterrupted_one_does(tiny):
    values = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1]
    follow(values)
    given = (*words(3, metric="score"), "checkpoint.keep_last=null")
    whole = tiny(*given)
    assert whole["epochs"] == 5
    for last, done in ((30, 3), (50, 5)):  # with one evaluation waited for; and after the stop, before the result
        folder = Path(tiny_copy(whole, f"{last}"))
        for path in (folder / "checkpoints").glob("step_*.pt"):
            if int(path.stem[5:]) > last:
                path.unlink()
        follow(values)
        Course.calls = done
        resumed = tiny(*given, f"resume={folder}")
        assert resumed["resumed_from"].endswith(f"step_{last:08d}.pt")
        assert (resumed["steps"], resumed["stopped_early"]) == (whole["steps"], whole["stopped_early"])


def test_two_hooks_of_one_class_resume_each_with_its_own_counts(tiny):
    values = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    follow(values)
    watched = (
        *words(3, metric="score"),
        "+custom_hooks.other={type: core.EarlyStopping, metric: score, direction: lower}",
    )
    given = (*watched, "checkpoint.keep_last=null")
    whole = tiny(*given)
    assert whole["epochs"] == 4  # the first waits, the second always improves
    folder = tiny_copy(whole, "copy")
    (folder / "checkpoints" / "step_00000040.pt").unlink()
    follow(values)
    Course.calls = 2  # the evaluation of step 30 is done again
    resumed = tiny(*given, f"resume={folder}")
    assert (resumed["steps"], resumed["stopped_early"]) == (whole["steps"], whole["stopped_early"])


def tiny_copy(result, name):
    """The run's folder without its result, beside it."""
    import shutil

    folder = Path(result["run_dir"]).with_name(name)
    shutil.copytree(result["run_dir"], folder)
    (folder / "result.json").unlink()
    return folder


@pytest.mark.processes
def test_two_processes_stop_together(user, tmp_path):
    """The figures of the processes differ: the first one's count, or one would wait for the other for ever."""
    (user / "mycourse.py").write_text(
        "import torch.distributed as dist\n\n\n"
        "class Course:\n"
        "    dataset_meta = None\n    calls = 0\n\n"
        "    def process(self, data_batch, data_samples):\n        pass\n\n"
        "    def evaluate(self, size):\n"
        "        self.calls += 1\n"
        "        return {'score': float(self.calls) if dist.get_rank() else 1.0}\n"
    )
    train(
        user,
        "val_evaluator={type: mycourse.Course}",
        "+custom_hooks.stop={type: core.EarlyStopping, metric: score, patience: 1}",
        "train_cfg.max_epochs=6",
        f"run_dir={tmp_path / 'run'}",
        torchrun=2,
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["epochs"] == 2 and result["processes"] == 2 and result["stopped_early"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (words(0), "patience=0"),
        (words(2, min_delta=-1), "min_delta=-1"),
        (words(2, metric="score", direction="best"), r"direction.*best"),
        (words(2), r"watches no metric: set its `metric`, or checkpoint\.metric"),
        ((*words(2, metric="score"), "val_dataloader=null"), "no val_dataloader"),
        ((*words(2, metric="score"), "train_cfg.val_every_epochs=null"), r"only the last step is evaluated.*val_every"),
        (words(2, metric="top1"), r"no number 'top1'; there are \['score'\]"),
        (words(2, patienc=1), "did you mean 'patience'"),
    ],
)
def test_what_cannot_be_meant(tiny, given, message):
    follow([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    with pytest.raises(ConfigError, match=message):
        tiny(*given)


class StopsAt(Hook):
    """Ends a training at a step, without an evaluation."""

    def __init__(self, metric, patience):
        self.step = 10 * patience + 4

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            runner.train_loop.stop_training = True


@pytest.mark.parametrize(
    "kind", ["core.EarlyStopping", "mmengine.hooks.EarlyStoppingHook", "test_early_stopping.StopsAt"]
)
@pytest.mark.parametrize("way", ["more patience", "switched off"])
def test_a_run_that_was_stopped_goes_on_with_more_patience_or_without_the_hook(tiny, kind, way):
    name = "min_delta: 0, rule: greater, monitor" if kind.startswith("mmengine") else "metric"
    hook = f"+custom_hooks.stop={{type: {kind}, {name}: score, patience: %d}}"
    common = [word for word in words(2) if "custom_hooks" not in word]
    follow([0.5, 0.4, 0.3, 0.3, 0.6, 0.2, 0.1, 0.1])  # the third evaluation is the first thing that is done again
    assert tiny(*common, hook % 2, "run_dir=stopped")["epochs"] < 4
    assert tiny(*common, hook % 2, "run_dir=stopped", "resume=auto")["epochs"] < 4  # it is over
    changed = [hook % 7] if way == "more patience" else []
    key = "custom_hooks.0.patience" if changed else "custom_hooks"
    result = tiny(*common, *changed, "resume=stopped", "run_dir=stopped", f"resume_changes=[{key}]")
    assert result["epochs"] == 6 and result["stopped_early"] is None
