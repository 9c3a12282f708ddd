"""Asked to stop, or stopped by an error: what was trained is saved, one line says so, and resume is exact."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from tiny_experiment import ROOT, command_line, environment, train

from core.checkpoint import CheckpointStore
from core.checkpoint.run_folder import find_checkpoint
from core.config.command.signals import Interrupted, StopRequest
from tests import forked

TEST = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"
RUN = (TEST, "runtime.sanity_batches=0", "model.network.dropout=0.2", "ema={decay: 0.9}", "train_cfg.max_epochs=3")
EVERY_7 = ("train_cfg.val_every_epochs=null", "train_cfg.val_every_steps=7", "checkpoint.every_steps=4")


def on_call(monkeypatch, target, name, number, action):
    """Does something before the `number`-th call of a method, counted from here; returns the counter."""
    method, calls = getattr(target, name), []

    def counted(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            action()
        return method(self, *args, **kwargs)

    monkeypatch.setattr(target, name, counted)
    return calls


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def log_of(run):
    """The log without times and rates."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    timed = ("time", "samples_per_second", "memory_mb", "eta_seconds")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def assert_same(one, other):
    """Two results, and what their runs have left."""
    first, second = (torch.load(find_checkpoint(r["run_dir"]), weights_only=True) for r in (one, other))
    assert first["step"] == second["step"]
    assert all(torch.equal(first["model"][k], second["model"][k]) for k in first["model"])
    assert log_of(one["run_dir"]) == log_of(other["run_dir"])
    for key in ("metrics", "val_metrics", "steps", "epochs"):
        assert one[key] == other[key] and one[key]
    stores = [CheckpointStore(Path(r["run_dir"]) / "checkpoints") for r in (one, other)]
    assert stores[0].steps() == stores[1].steps()
    assert [stores[0].metrics(s) for s in stores[0].steps()] == [stores[1].metrics(s) for s in stores[1].steps()]


@pytest.mark.parametrize("action", [ctrl_c, sigterm])
@pytest.mark.parametrize(
    ("options", "call", "where", "saved"),
    [
        ((), 2, "in the validation of step 10", 10),  # three batches to an evaluation
        ((), 8, "in the validation of step 30", 30),
        (EVERY_7, 5, "in the validation of step 14", 14),
        (EVERY_7, 13, "in the validation of step 30", 30),
        ((), 11, "in the test", 30),
        (("train_cfg.val_every_epochs=null",), 1, "in the validation of step 30", 30),  # the only evaluation
    ],
)
def test_stopped_in_an_evaluation_it_goes_on_there(tiny, monkeypatch, action, options, call, where, saved):
    import mypoints

    whole = tiny(*RUN, *options, "run_dir=whole")
    with monkeypatch.context() as patch:
        calls = on_call(patch, mypoints.Accuracy, "process", call, action)
        with pytest.raises(Interrupted) as caught:
            tiny(*RUN, *options, "run_dir=stopped")
    assert len(calls) == call  # after that very batch
    newest = find_checkpoint("stopped")
    assert str(caught.value) == f"stopped {where}; saved {newest}; go on with resume=auto"
    assert newest.name == f"step_{saved:08d}.pt" and not Path("stopped/result.json").exists()
    assert_same(whole, tiny(*RUN, *options, "run_dir=stopped", "resume=auto"))


@pytest.mark.parametrize("options", [(), EVERY_7, ("train_cfg.val_every_epochs=null",)])
def test_an_error_in_the_last_evaluation_loses_nothing(tiny, monkeypatch, options):
    import mypoints

    def broken():
        raise OSError("this sample is broken")

    whole = tiny(*RUN, *options, "run_dir=whole")
    for split, seed in (("validation", 1), ("test", 5)):
        with monkeypatch.context() as patch:
            read = mypoints.Points.__getitem__

            def fail_at_the_end(self, index, read=read, seed=seed):
                trained = CheckpointStore("broken/checkpoints").path(30).exists()
                return broken() if trained and len(self) == {1: 21, 5: 9}[seed] else read(self, index)

            patch.setattr(mypoints.Points, "__getitem__", fail_at_the_end)
            with pytest.raises(Exception, match="this sample is broken"):
                tiny(*RUN, *options, "run_dir=broken", "resume=auto")
        assert find_checkpoint("broken").name == "step_00000030.pt", split
    assert_same(whole, tiny(*RUN, *options, "run_dir=broken", "resume=auto"))


def test_no_evaluation_twice_and_no_checkpoint_twice(tiny, monkeypatch):
    import mypoints

    evaluations = on_call(monkeypatch, mypoints.Accuracy, "evaluate", 0, ctrl_c)
    written = on_call(monkeypatch, CheckpointStore, "save", 0, ctrl_c)
    tiny(*RUN, *EVERY_7, "checkpoint={every_steps: 7, metric: accuracy}")
    assert len(written) == len({7, 14, 21, 28, 30})
    assert len(evaluations) == len({7, 14, 21, 28, 30, "test"})


def test_stopped_between_evaluation_and_step_it_evaluates_again_and_logs_once(tiny, monkeypatch):
    import mypoints

    whole = tiny(*RUN, *EVERY_7, "run_dir=whole")
    with monkeypatch.context() as patch:
        on_call(patch, mypoints.Accuracy, "evaluate", 2, ctrl_c)  # its figures are still computed and logged
        with pytest.raises(Interrupted, match=r"stopped at step 14; saved .*step_00000014.pt"):
            tiny(*RUN, *EVERY_7, "run_dir=stopped")
    assert_same(whole, tiny(*RUN, *EVERY_7, "run_dir=stopped", "resume=auto"))


def test_hooks_that_draw_after_an_evaluation_draw_the_same_after_a_resume(tiny, monkeypatch):
    import mypoints

    options = (*RUN, *EVERY_7, "custom_hooks=[{type: test_engine_stop.Drawing}]")
    whole = tiny(*options, "run_dir=whole")
    with monkeypatch.context() as patch:
        on_call(patch, mypoints.Accuracy, "process", 5, ctrl_c)
        with pytest.raises(Interrupted):
            tiny(*options, "run_dir=stopped")
    assert_same(whole, tiny(*options, "run_dir=stopped", "resume=auto"))


class Drawing(Hook):
    """A hook that moves the generators on, as a user's may."""

    priority = "NORMAL"

    def after_val_epoch(self, runner, metrics=None):
        torch.rand(5)


@pytest.mark.parametrize("action", [ctrl_c, sigterm])
def test_stopped_while_it_starts(tiny, monkeypatch, action):
    import mypoints

    with monkeypatch.context() as patch:
        on_call(patch, mypoints.Points, "__init__", 1, action)
        with pytest.raises(Interrupted, match=r"^stopped before training began: nothing is lost$"):
            tiny(*RUN, "run_dir=stopped")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are as they were
    assert not list(Path("stopped").glob("checkpoints/*"))
    with monkeypatch.context() as patch:
        on_call(patch, mypoints.Points, "__getitem__", 3, action)  # within the first batch
        with pytest.raises(Interrupted, match=r"^stopped before training began: nothing is lost$"):
            tiny(*RUN, "run_dir=stopped", "resume=auto")
    assert tiny(*RUN, "run_dir=stopped", "resume=auto")["steps"] == 30


def test_stopped_while_it_starts_again_or_between_stages(tiny, monkeypatch):
    import mypoints

    stages = "stages=[{name: first, train_cfg: {max_epochs: 1}}, {name: second, train_cfg: {max_epochs: 1}}]"
    with monkeypatch.context() as patch:
        on_call(patch, mypoints.Accuracy, "process", 6, ctrl_c)  # the last batch of the first stage's test
        with pytest.raises(Interrupted, match=r"in the test; saved .*first"):
            tiny(*RUN, stages, "run_dir=staged")
    with monkeypatch.context() as patch:
        on_call(patch, mypoints.Points, "__init__", 1, ctrl_c)
        with pytest.raises(Interrupted, match="before training went on: nothing is lost; go on with resume=auto"):
            tiny(*RUN, stages, "run_dir=staged", "resume=auto")
    with monkeypatch.context() as patch:
        on_call(patch, mypoints.Accuracy, "evaluate", 2, ctrl_c)  # the first stage is over when it is noticed
        with pytest.raises(Interrupted, match="finished stages are kept; go on with resume=auto"):
            tiny(*RUN, stages, "run_dir=staged", "resume=auto")
    assert Path("staged/stage_0_first/result.json").exists() and not Path("staged/stage_1_second/checkpoints").exists()
    assert set(tiny(*RUN, stages, "run_dir=staged", "resume=auto")["stages"]) == {"first", "second"}


def test_a_request_outlives_the_context_in_which_it_arrives():
    with StopRequest("outer") as outer:
        with StopRequest("inner") as inner:
            inner.defer()
            ctrl_c()
            assert inner.requested()
        with pytest.raises(Interrupted, match="outer"):
            outer.check()
    with StopRequest() as later:
        assert not later.requested()


# --- programs ------------------------------------------------------------------------------------------------------

WAITING = """
import os
import signal
import time

import mypoints


def wait(name):
    if os.environ.get("WAIT_IN") == name:
        open(os.environ["WAIT_MARK"], "w").close()
        while not os.path.exists(os.environ["WAIT_MARK"] + "_go"):
            time.sleep(0.01)


wait("import")


class Accuracy(mypoints.Accuracy):
    batches = 0

    def process(self, data_batch, data_samples):
        super().process(data_batch, data_samples)
        self.batches += 1
        wait("evaluation")
        if os.environ.get("STOP_RANK") == os.environ.get("RANK", "-") and self.batches == 2:
            os.kill(os.getpid(), signal.SIGTERM)
"""


TWICE = """
import os, signal
from core.config.command import signals
signals._SAME_REQUEST = 600  # seconds: between these two, however busy the machine is
with signals.StopRequest() as stop:
    stop.defer()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what the terminal has sent to all
    print("noted", stop.requested(), flush=True)
    signals._SAME_REQUEST = 0
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


@pytest.mark.child
def test_a_second_signal_leaves_at_once():
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout == "noted True\n" and done.returncode == 128 + signal.SIGTERM


@pytest.fixture
def waiting(user):
    (user / "mywaiting.py").write_text(WAITING)
    return user


def signalled(user, place, number, *overrides, tool="train.py"):
    """Sends a signal to a tool that waits at a place for it; returns its exit status and what it wrote."""
    mark = user / f"mark_{place}_{number}_{tool}"
    extra = {"WAIT_IN": place, "WAIT_MARK": str(mark)}
    words = command_line(*RUN, "val_evaluator={type: mywaiting.Accuracy}", *overrides, tool=tool)
    process = forked.begin(words[1:], user, {**environment(), **extra})
    deadline = time.monotonic() + 600
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    Path(f"{mark}_go").touch()
    done = process.done()
    return done.returncode, done.stderr


@pytest.mark.child
@pytest.mark.parametrize(
    ("place", "number", "tool", "line"),
    [
        ("import", signal.SIGINT, "train.py", "stopped before training began: nothing is lost"),
        ("evaluation", signal.SIGTERM, "train.py", "step_00000010.pt; go on with resume=auto"),
        ("import", signal.SIGTERM, "test.py", "stopped before it was done"),
    ],
)
def test_a_tool_that_is_asked_to_stop_says_one_line(waiting, place, number, tool, line):
    options = ["checkpoint=none.pt"] if tool == "test.py" else [f"run_dir=asked_{place}_{number}"]
    (waiting / "none.pt").touch()
    status, errors = signalled(waiting, place, number, *options, tool=tool)
    assert status == 2, errors
    assert len(errors.splitlines()) == 1 and errors.strip().endswith(line), errors


@pytest.mark.processes
def test_two_processes_agree_on_stopping_within_an_evaluation(waiting):
    options = (
        "val_evaluator={type: mywaiting.Accuracy}",
        "val_dataloader={batch_size: 4, dataset: {count: 17}}",  # three batches on one process, two on the other
        "train_cfg.max_epochs=1",
        "runtime.sanity_batches=0",  # the signal is to come in the evaluation itself
        "run_dir=agreed",
        "log_every=100",
    )
    stopped = forked.run(command_line(*options)[1:], waiting, {**environment(), "STOP_RANK": "1"}, processes=2)
    newest = find_checkpoint(waiting / "agreed")
    assert stopped.returncode and newest.name == "step_00000005.pt"
    said = f"stopped in the validation of step 5; saved agreed/checkpoints/{newest.name}; go on with resume=auto"
    assert stopped.stderr.count(said) >= 1 and "Traceback" not in stopped.stderr.split(said)[0], stopped.stderr
    train(waiting, *options, "resume=auto", torchrun=2)
    assert json.loads((waiting / "agreed" / "result.json").read_text())["metrics"]["seen"] == 17
    assert [line["val/seen"] for line in log_of(waiting / "agreed") if "val/seen" in line] == [17]
