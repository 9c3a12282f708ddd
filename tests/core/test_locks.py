"""Locks: one holder at a time, who says who it is; the dead hold nothing, with and without a file system's locks."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.checkpoint.locks import FileLock, Holder, Locked

ROOT = Path(__file__).parents[2]
# Holds the lock until the file `go` is there, with a child that outlives it; says when it has it.
HOLD = """
import os, sys, time
from pathlib import Path
from core.checkpoint.locks import FileLock

lock = FileLock(sys.argv[1], "it")
lock.acquire()
if os.fork() == 0:
    while os.getppid() != 1 and not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock `tmp_path/.lock`, with a child of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock"), str(tmp_path / "go")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its child, too
    process.wait()
    process.stdout.close()


@pytest.fixture(params=["with locks", "without locks"])
def disk(request, monkeypatch):
    """A file system that knows locks, and one that does not."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "without locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def test_one_holds_it_and_the_others_are_told_who(tmp_path, disk):
    first, second = (FileLock(tmp_path / ".lock", "run_dir=x") for _ in range(2))
    with first:
        assert first.held and list(tmp_path.iterdir())
        with pytest.raises(Locked, match=f"run_dir=x is in use by process {os.getpid()} on {socket.gethostname()}"):
            second.acquire()
        assert not second.held
    second.acquire()
    second.release()
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_size] == []


@pytest.mark.child
def test_another_process_is_named_and_waited_for(tmp_path, holder):
    lock = FileLock(tmp_path / ".lock", "it")
    with pytest.raises(Locked, match=f"process {holder.pid} on {socket.gethostname()}") as caught:
        lock.acquire()
    assert caught.value.holder.pid == holder.pid
    told = []

    def tell(line):
        told.append(line)
        (tmp_path / "go").touch()

    lock.wait(tell, every=0.01)
    assert lock.held and told == [f"waiting for {caught.value.holder}: it"]


@pytest.mark.child
def test_a_killed_process_holds_nothing_though_a_child_of_it_lives(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock = FileLock(tmp_path / ".lock", "it")
    lock.acquire()
    assert Holder.read(tmp_path / ".lock").pid == os.getpid()


def test_waiting_for_oneself_would_not_end(tmp_path):
    with FileLock(tmp_path / ".lock", "it"), pytest.raises(Locked):
        FileLock(tmp_path / ".lock", "it").wait(print)


@pytest.mark.child
@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, False),
        ({"began": 1}, True),  # the number was used again
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
        ({"boot": "another"}, True),  # the machine was started again
    ],
)
def test_without_locks_the_file_tells_whether_its_holder_lives(tmp_path, monkeypatch, change, dead):
    monkeypatch.setattr(fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "not supported")))
    holder = replace(Holder.this_process(), **change)
    (tmp_path / ".lock.pid").write_text(json.dumps(vars(holder)))
    lock = FileLock(tmp_path / ".lock", "it")
    if dead:
        lock.acquire()
        assert Holder.read(tmp_path / ".lock.pid").began == Holder.this_process().began
    else:
        with pytest.raises(Locked, match=f"process {holder.pid} on {holder.host}"):
            lock.acquire()


def test_a_lock_of_the_kernel_counts_whatever_the_file_says(tmp_path):
    with FileLock(tmp_path / ".lock", "it"):
        (tmp_path / ".lock").write_text("half a rec")
        with pytest.raises(Locked, match="in use by another process"):
            FileLock(tmp_path / ".lock", "it").acquire()


@pytest.mark.child
def test_a_forked_child_neither_holds_nor_releases(tmp_path):
    lock = FileLock(tmp_path / ".lock", "it")
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(int(lock.held))
    assert os.waitpid(child, 0)[1] == 0
    assert lock.held and (tmp_path / ".lock").exists()
    with pytest.raises(Locked):
        FileLock(tmp_path / ".lock", "it").acquire()


def test_a_folder_that_cannot_be_written_is_the_callers_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        FileLock(tmp_path / "nowhere" / ".lock", "it").acquire()
