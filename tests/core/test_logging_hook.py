"""The logging hook: exact window means, resume without a trace, several processes, bars on a terminal."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.visualization import Visualizer

from core.checkpoint import load, save_atomic
from core.engine.hooks.logging import LoggingHook
from core.engine.hooks.media import MediaHook, first_items
from core.output.backends import JsonLines
from tests import forked


class FakeRunner:
    """As much of a Runner as hooks see."""

    def __init__(self, folder: Path, steps: int = 20, per_epoch: int = 8, groups: list | None = None) -> None:
        self.work_dir = str(folder)
        self.iter = self.epoch = 0
        self.max_iters, self.max_epochs = steps, -(-steps // per_epoch)
        self._train_loop = SimpleNamespace(steps_per_epoch=per_epoch)
        self.val_dataloader = range(3)
        self.visualizer = Visualizer(vis_backends=[JsonLines(str(folder))], name=f"fake{id(self)}")
        parameter = torch.nn.Parameter(torch.zeros(1))
        options = groups or [{"lr": 0.1}]
        optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], **g} for g in options])
        self.optim_wrapper = SimpleNamespace(optimizer=optimizer)
        self.model = parameter
        self.logger = logging.getLogger(f"fake{id(self)}")
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())
        self.logger.addHandler(handler)

    def lines(self) -> list[dict]:
        path = Path(self.work_dir) / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def _outputs(step: int, device: str = "cpu") -> dict:
    """Losses whose mean shows every rounding; the adversarial term comes at every third step only."""
    generator = torch.Generator().manual_seed(step)
    values = torch.rand(2, generator=generator) * 10.0 ** torch.randint(-3, 3, (2,), generator=generator)
    terms = {"loss": values.sum(), "loss_ce": values[0], "grad_norm": values[1]}
    if step % 3 == 0:
        terms["loss_adv"] = values[1] / 3
    return terms


BATCH = {"image": torch.zeros(4, 2), "sample_id": ["a"] * 4}


def _train(hook: LoggingHook, runner: FakeRunner, until: int, evaluate_every: int | None = None) -> None:
    hook.before_train(runner)
    while runner.iter < until:
        hook.before_train_iter(runner, 0, BATCH)
        hook.after_train_iter(runner, 0, BATCH, _outputs(runner.iter))
        runner.iter += 1
        if evaluate_every and runner.iter % evaluate_every == 0:
            _evaluate(hook, runner)


def _evaluate(hook: LoggingHook, runner: FakeRunner) -> None:
    hook.before_val_epoch(runner)
    for index in range(3):
        hook.after_val_iter(runner, index)
    hook.after_val_epoch(runner, {"top1": runner.iter / 100, "names": ["a"]})


def _losses(lines: list[dict]) -> list[dict]:
    """Everything but what depends on the clock."""
    clock = ("time", "time/step", "time/data", "samples_per_second", "eta_seconds", "memory_mb")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def test_every_window_holds_the_mean_of_its_steps(tmp_path):
    runner, hook = FakeRunner(tmp_path, steps=12), LoggingHook(5, progress="plain")
    _train(hook, runner, 12)
    hook.after_train(runner)
    lines = runner.lines()
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert [line["epoch"] for line in lines] == [1, 2, 2]
    for line, steps in zip(lines, (range(5), range(5, 10), range(10, 12)), strict=True):
        for name in ("loss", "loss_ce", "grad_norm"):
            assert line[name] == sum(float(_outputs(s)[name].double()) for s in steps) / len(steps)
        adversarial = [float(_outputs(s)["loss_adv"].double()) for s in steps if s % 3 == 0]
        assert line.get("loss_adv") == (sum(adversarial) / len(adversarial) if adversarial else None)
    assert lines[0]["lr"] == 0.1 and "momentum" not in lines[0]
    assert lines[1]["time/step"] > 0 and lines[1]["samples_per_second"] > 0 and lines[1]["memory_mb"] > 50
    assert lines[-1]["eta_seconds"] == 0


def test_the_device_is_read_once_per_window(tmp_path, monkeypatch):
    """Item and tolist are what makes a step wait for a GPU."""
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, _o=original, **k: (reads.append(1), _o(t, *a, **k))[1])
    runner, hook = FakeRunner(tmp_path, steps=1000), LoggingHook(10, progress="plain")
    outputs = [_outputs(step) for step in range(10)]
    reads.clear()
    hook.before_train(runner)
    for step in range(10):
        runner.iter = step
        hook.before_train_iter(runner, 0, BATCH)
        hook.after_train_iter(runner, 0, BATCH, outputs[step])
        assert len(reads) == (0 if step < 9 else 1)


@pytest.mark.parametrize("killed_at", [3, 5, 8, 13])
def test_a_run_resumed_inside_a_window_logs_what_an_uninterrupted_one_does(tmp_path, killed_at):
    whole, hook = FakeRunner(tmp_path / "whole"), LoggingHook(5, progress="plain")
    _train(hook, whole, 20, evaluate_every=4)
    runner, hook = FakeRunner(tmp_path / "killed"), LoggingHook(5, progress="plain")
    _train(hook, runner, killed_at, evaluate_every=4)
    save_atomic({"hook": hook.state_dict()}, tmp_path / "state.pt")
    _evaluate(hook, runner)  # written after the checkpoint, and written again after the resume
    _train(hook, runner, min(killed_at + 4, 20), evaluate_every=4)
    resumed, hook = FakeRunner(tmp_path / "killed"), LoggingHook(5, progress="plain")
    hook.load_state_dict(load(tmp_path / "state.pt")["hook"])
    resumed.iter = killed_at
    _train(hook, resumed, 20, evaluate_every=4)
    assert _losses(resumed.lines()) == _losses(whole.lines())


def test_saving_a_checkpoint_changes_nothing_in_the_log(tmp_path):
    quiet, hook = FakeRunner(tmp_path / "quiet"), LoggingHook(5, progress="plain")
    _train(hook, quiet, 20)
    busy, hook = FakeRunner(tmp_path / "busy"), LoggingHook(5, progress="plain")
    hook.before_train(busy)
    for step in range(20):
        busy.iter = step
        hook.before_train_iter(busy, 0, BATCH)
        hook.after_train_iter(busy, 0, BATCH, _outputs(step))
        hook.state_dict()
    assert _losses(busy.lines()) == _losses(quiet.lines())


def test_a_run_that_stops_early_writes_its_last_steps(tmp_path):
    runner, hook = FakeRunner(tmp_path, steps=100), LoggingHook(5, progress="plain")
    _train(hook, runner, 7)
    hook.after_train(runner)
    assert [line["step"] for line in runner.lines()] == [5, 7]
    assert runner.lines()[1]["loss"] == sum(float(_outputs(s)["loss"].double()) for s in (5, 6)) / 2


def test_metrics_of_an_evaluation_are_logged_with_its_step(tmp_path):
    runner, hook = FakeRunner(tmp_path), LoggingHook(100, progress="plain")
    _train(hook, runner, 8, evaluate_every=4)
    assert [(x["step"], x["epoch"], x["val/top1"]) for x in runner.lines()] == [(4, 1, 0.04), (8, 1, 0.08)]
    assert any("val/top1 0.08" in message for message in runner.messages)
    hook.before_test_epoch(runner)
    hook.after_test_epoch(runner, {"top1": 0.5})
    assert runner.lines()[-1]["test/top1"] == 0.5


def test_learning_rates_per_group_and_changing_momentum(tmp_path):
    groups = [{"lr": 0.1, "name": "body"}, {"lr": 0.1, "name": "body_no_decay"}, {"lr": 1.0, "name": "head"}]
    runner, hook = FakeRunner(tmp_path, groups=groups), LoggingHook(1, progress="plain")
    _train(hook, runner, 1)
    runner.optim_wrapper.optimizer.param_groups[0]["betas"] = (0.85, 0.999)
    hook.before_train_iter(runner, 0, BATCH)
    hook.after_train_iter(runner, 0, BATCH, _outputs(1))
    first, second = runner.lines()
    assert {k: v for k, v in first.items() if k.startswith("lr")} == {"lr": 1.0, "lr/body": 0.1, "lr/head": 1.0}
    assert "momentum" not in first and second["momentum"] == 0.85
    runner.optim_wrapper = SimpleNamespace(
        optim_wrappers={"g": runner.optim_wrapper, "d": FakeRunner(tmp_path).optim_wrapper}
    )
    runner.iter = 2
    hook.before_train_iter(runner, 0, BATCH)
    hook.after_train_iter(runner, 0, BATCH, _outputs(2))
    assert runner.lines()[-1]["lr_g/head"] == 1.0 and runner.lines()[-1]["lr_d"] == 0.1


def test_time_of_evaluations_and_checkpoints_is_no_step_time(tmp_path, monkeypatch):
    import core.engine.hooks.logging as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    runner, hook = FakeRunner(tmp_path, steps=8), LoggingHook(8, progress="plain")
    hook.before_train(runner)
    for step in range(8):
        runner.iter = step
        clock[0] += 0.5  # waiting for data
        hook.before_train_iter(runner, 0, BATCH)
        clock[0] += 1.5  # computing
        hook.after_train_iter(runner, 0, BATCH, _outputs(step))
        if step == 3:
            hook.state_dict()
            clock[0] += 1000.0
        if step == 5:
            runner.iter = 6
            hook.before_val_epoch(runner)
            clock[0] += 1000.0
            hook.after_val_epoch(runner, {})
    line = runner.lines()[-1]
    assert line["time/step"] == pytest.approx(2.0) and line["time/data"] == pytest.approx(0.5)
    assert line["samples_per_second"] == pytest.approx(2.0)


@pytest.mark.parametrize("options", [{"interval": 0}, {"progress": "loud"}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LoggingHook(**options)


# --- several processes ---------------------------------------------------------------------------------------------

WORKER = textwrap.dedent(
    """
    import os, sys
    sys.path.insert(0, os.path.join("tests", "core"))
    import torch, torch.distributed as dist
    from pathlib import Path
    from test_logging_hook import BATCH, FakeRunner, _outputs
    from core.engine.hooks.logging import LoggingHook
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(sys.argv[1])

    def train(hook, runner, until):
        hook.before_train(runner)
        while runner.iter < until:
            outputs = _outputs(2 * runner.iter + rank)  # terms differ between the processes, too
            hook.before_train_iter(runner, 0, BATCH)
            hook.after_train_iter(runner, 0, BATCH, outputs)
            runner.iter += 1

    train(LoggingHook(4, "plain"), FakeRunner(folder / "whole", 10), 10)
    hook = LoggingHook(4, "plain")
    train(hook, FakeRunner(folder / "killed", 10), 6)
    state = [hook.state_dict()]
    dist.broadcast_object_list(state)  # what the first process saved
    hook, runner = LoggingHook(4, "plain"), FakeRunner(folder / "killed", 10)
    hook.load_state_dict(state[0])
    runner.iter = 6
    train(hook, runner, 10)
    dist.destroy_process_group()
    """
)


@pytest.mark.processes
def test_losses_are_means_over_processes_and_survive_a_resume(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ran = forked.run([str(tmp_path / "worker.py"), str(tmp_path)], os.getcwd(), environment, 2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    whole, killed = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed"))
    whole, killed = ([json.loads(line) for line in lines] for lines in (whole, killed))
    assert _losses(whole) == _losses(killed)
    assert [line["step"] for line in whole] == [4, 8, 10]
    first = [float(_outputs(2 * step + rank)["loss"].double()) for step in range(4) for rank in range(2)]
    assert whole[0]["loss"] == pytest.approx(sum(first) / 8, rel=1e-12)


# --- terminal ------------------------------------------------------------------------------------------------------

SHOW = textwrap.dedent(
    """
    import logging, multiprocessing, os, sys, time, tempfile, warnings
    sys.path.insert(0, os.path.join("tests", "core"))
    from pathlib import Path
    from test_logging_hook import FakeRunner, _evaluate, _outputs, BATCH
    from core.engine.hooks.logging import LoggingHook
    runner = FakeRunner(Path(tempfile.mkdtemp()), steps=12)
    runner.logger.addHandler(logging.StreamHandler(sys.stdout))
    runner.logger.addHandler(logging.FileHandler(sys.argv[1]))
    library = logging.getLogger("library")
    library.addHandler(logging.StreamHandler())

    def work():
        warnings.warn("warned by a worker")
        print("printed by a worker")
        os.write(2, b"written by a C library\\n")

    hook = LoggingHook(4)
    hook.before_train(runner)
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    while runner.iter < 12:
        hook.before_train_iter(runner, 0, BATCH)
        time.sleep(0.1)
        hook.after_train_iter(runner, 0, BATCH, _outputs(runner.iter))
        runner.iter += 1
        if runner.iter == 6:
            runner.logger.info("a line from elsewhere")
            library.warning("logged by a library")
            warnings.warn("warned by a library")
            _evaluate(hook, runner)
    hook.after_train(runner)
    hook.after_run(runner)
    runner.logger.info("the end")
    """
)


@pytest.mark.child
def test_a_pipe_gets_plain_lines(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", SHOW, str(tmp_path / "run.log")], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    assert "\x1b" not in ran.stdout
    lines = ran.stdout.splitlines()
    assert [line for line in lines if "step 4/12" in line and "loss_ce" in line and "lr 0.1" in line and "left" in line]
    assert "step 6  val/top1 0.06" in lines and lines[-1] == "the end"
    assert "printed by a worker" in lines and "warned by a worker" in ran.stderr


@pytest.mark.child
@pytest.mark.parametrize("columns", ["60", "160"])
def test_a_terminal_gets_bars_and_the_log_file_plain_lines(tmp_path, columns):
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": columns, "LINES": "40"}
    for name in ("CI", "NO_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW, str(tmp_path / "run.log")], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 1 << 16)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(600) == 0, output
    text = output.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "━" in text and re.search(r"train .*\b\d+/12\b.*/s.* left .*loss", plain), plain
    assert "val" in plain and "the end" in plain
    for said in (
        "a line from elsewhere",
        "logged by a library",
        r"<string>:\d+: UserWarning: warned by a library",
        r"<string>:\d+: UserWarning: warned by a worker",
        "printed by a worker",
        "written by a C library",
    ):  # on a line of its own, from which the bar is gone
        assert len(re.findall(rf"(?:\x1b\[2K|\n){said}\r?\n", text)) == 1, text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor comes back
    log = (tmp_path / "run.log").read_text()
    assert "step 4/12" in log and "step 12/12" in log and "val/top1 0.06" in log and "\x1b" not in log


# --- media ---------------------------------------------------------------------------------------------------------


class Painter(torch.nn.Module):
    """A trainer that shows its batch, and a draw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []

    def media(self, batch: dict) -> dict:
        self.seen.append(batch)
        picture = torch.randint(0, 255, (6, 6, 3), dtype=torch.uint8)
        return {"tokens/first layer": picture, "walk": picture.expand(3, 6, 6, 3)}


def _evaluations(hook: MediaHook, runner: FakeRunner, count: int) -> None:
    for _ in range(count):
        runner.iter += 10
        hook.before_val_epoch(runner)
        for index in range(2):
            batch = {"image": torch.full((5, 1), index), "sample_id": list("abcde"), "scale": torch.tensor(2.0)}
            hook.after_val_iter(runner, index, batch)
        hook.after_val_epoch(runner, {})


def test_media_are_written_after_every_nth_evaluation(tmp_path):
    runner, hook = FakeRunner(tmp_path), MediaHook(interval=2, max_items=3)
    runner.model = Painter()
    before = torch.get_rng_state()
    _evaluations(hook, runner, 4)
    assert torch.equal(torch.get_rng_state(), before)  # training's randomness is as it was
    names = ["tokens_first_layer", "walk"]
    assert sorted(p.name for p in (tmp_path / "media").iterdir()) == [
        f"{name}_step_{step:08d}{suffix}"
        for name, suffix in zip(names, (".png", ".gif"), strict=True)
        for step in (20, 40)
    ]
    assert runner.model.seen[0]["image"].tolist() == [[0], [0], [0]] and runner.model.seen[0]["sample_id"] == list(
        "abc"
    )
    assert runner.model.seen[0]["scale"] == 2.0
    from PIL import Image

    pictures = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "media").glob("*.png"))]
    assert np.array_equal(*pictures)  # the same draws every time, so that steps can be compared


def test_counting_goes_on_after_a_resume_and_other_trainers_are_left_alone(tmp_path):
    runner, hook = FakeRunner(tmp_path), MediaHook(interval=2)
    runner.model = torch.nn.Linear(1, 1)
    _evaluations(hook, runner, 3)
    assert not (tmp_path / "media").exists()
    resumed = MediaHook(interval=2)
    resumed.load_state_dict(hook.state_dict())
    runner.model = Painter()
    _evaluations(resumed, runner, 1)
    assert len(list((tmp_path / "media").iterdir())) == 2
    with pytest.raises(ValueError, match="max_items=0"):
        MediaHook(max_items=0)


def test_media_reach_backends_that_take_them(tmp_path):
    taken = []
    runner, hook = FakeRunner(tmp_path), MediaHook()
    runner.model = Painter()
    backend = runner.visualizer._vis_backends["JsonLines"]
    backend.add_image = lambda name, image, step: taken.append((name, image.shape, step))
    backend.add_video = lambda name, path, step: taken.append((name, path.suffix, step))
    _evaluations(hook, runner, 1)
    assert taken == [("tokens/first layer", (6, 6, 3), 10), ("walk", ".gif", 10)]


def test_first_items_cuts_only_what_is_as_long_as_the_batch():
    batch = {"x": torch.zeros(4, 2), "names": list("abcd"), "classes": ["a", "b"], "text": "abcd", "n": 4}
    assert {k: len(v) for k, v in first_items(batch, 2).items() if k != "n"} == {
        "x": 2,
        "names": 2,
        "classes": 2,
        "text": 4,
    }
