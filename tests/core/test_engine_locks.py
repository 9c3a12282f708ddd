"""Two runs in one folder: the second is refused, and changes nothing."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from tiny_experiment import begin, losses, train

from core.checkpoint.locks import FileLock, Locked
from core.config import compose
from core.engine.launch import run
from core.errors import ConfigError
from core.trainer import Trainer


@pytest.fixture
def tiny(user, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    common = ["experiment=mine/tiny", "runtime=cpu", "train_cfg.max_epochs=1", "checkpoint.every_steps=2", "media=null"]
    return lambda *words: run(compose([*common, *words], config_dir=user / "configs"))


def inside(monkeypatch, number, call):
    """Calls something in the middle of the `number`-th phase of a run to come."""
    phase, seen = Trainer.phase, 0

    def interrupted(self, *args, **options):
        nonlocal seen
        seen += 1
        if seen == number:
            call()
        return phase(self, *args, **options)

    monkeypatch.setattr(Trainer, "phase", interrupted)


@pytest.mark.parametrize(
    "second",
    [["run_dir=here"], ["run_dir=here", "resume=auto"], ["resume=here"], ["resume=here", "train_cfg.max_epochs=2"]],
)
def test_a_second_run_in_a_folder_is_refused(tiny, monkeypatch, second):
    def refused():
        before = {p: p.stat().st_mtime_ns for p in Path("here").rglob("*")}
        who = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(Locked, match=f"run_dir=here is in use by {who}.*another run_dir"):
            tiny(*second)
        assert {p: p.stat().st_mtime_ns for p in Path("here").rglob("*")} == before

    inside(monkeypatch, 5, refused)
    assert tiny("run_dir=here")["steps"] == 10
    assert sorted(losses("here")) == [3, 6, 9, 10]


def test_a_second_auto_does_not_go_on_beside_the_first(tiny, monkeypatch):
    def refused():
        with pytest.raises(Locked):
            tiny("resume=auto")

    inside(monkeypatch, 5, refused)
    first = tiny("resume=auto")
    assert [p.name for p in Path("runs/mine/tiny").glob("2*")] == [Path(first["run_dir"]).name]


def test_two_fresh_runs_get_folders_of_their_own(tiny, monkeypatch):
    others = []
    inside(monkeypatch, 5, lambda: others.append(tiny()))
    first = tiny()
    assert first["run_dir"] != others[0]["run_dir"]


def test_a_run_that_fails_leaves_no_lock_and_no_empty_folder(tiny, monkeypatch):
    inside(monkeypatch, 5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny("run_dir=here")
    FileLock("here/.lock", "here").acquire()
    with pytest.raises(ConfigError, match="resume_changes"):
        tiny("run_dir=there", "resume_changes=[seed]")
    assert not Path("there").exists()


@pytest.mark.child
def test_a_killed_process_does_not_block(user, tmp_path):
    words = ["run_dir=dead_holder", "train_dataloader.num_workers=2", "log_every=1", "train_cfg.max_epochs=100000"]
    process = begin(user, *words)
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline and not (user / "dead_holder" / "log.jsonl").exists():
        time.sleep(0.02)
    refused = train(user, "run_dir=dead_holder", "resume=auto", *words[1:], check=False)
    assert process.poll() is None
    assert refused.returncode == 2 and f"process {process.pid} on {socket.gethostname()}" in refused.stderr
    process.send_signal(signal.SIGKILL)
    process.done()
    lock = FileLock(user / "dead_holder" / ".lock", "dead_holder")
    lock.acquire()  # at once, while its workers may still be there
    lock.release()
