"""Programs that start at once: forked from a process that has imported torch, mmengine and the engine, and no more.

A fresh interpreter takes seconds to import these, torchrun with two processes three times as long. What a start itself
is asked (help without heavy imports, signals while it imports, torchrun's launcher) still takes a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

from tests import costs

ROOT = Path(__file__).resolve().parents[1]
_FLAGS = ("-m", "-c")
_nursery: subprocess.Popen[str] | None = None


def run(words: list[str], cwd: Path | str, env: dict[str, str], processes: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a script as `python script words...` would, and waits for it.

    Args:
        words: the script's path and its arguments; in its place, as for Python, `-m` and a module or `-c` and code.
        cwd: its working directory.
        env: its environment; what is read by imports (OMP_NUM_THREADS, PYTHONWARNINGS) is that of the first call.
        processes: 0, or how many are started as torchrun would; one that fails ends the others, and the status is 1.

    Returns:
        Exit status, standard output and errors; those of several processes are one text each.
    """
    return begin(words, cwd, env, processes).done()


def begin(
    words: list[str], cwd: Path | str, env: dict[str, str], processes: int = 0, largest: int | None = None
) -> Begun:
    """As `run`, without waiting for it.

    Args:
        words, cwd, env, processes: of `run`.
        largest: bytes of the largest file that it may write, as on a disk that is full; None: any.
    """
    costs.note("child", "a forked program")
    nursery = _started(env)
    folder = tempfile.TemporaryDirectory()
    out, err = Path(folder.name, "out"), Path(folder.name, "err")
    for file in (out, err):
        file.touch()
    request = {
        "words": words,
        "cwd": str(cwd),
        "env": env,
        "processes": processes,
        "largest": largest,
        "out": str(out),
        "err": str(err),
        "status": str(Path(folder.name, "status")),
    }
    nursery.stdin.write(json.dumps(request) + "\n")
    nursery.stdin.flush()
    return Begun(words, int(nursery.stdout.readline()), folder)


class Begun:
    """A forked program that may still be there; with several processes, `pid` is their launcher's.

    Args:
        words: the script's path and its arguments.
        pid: of the process, which leads a group of its own.
        folder: where it writes.
    """

    def __init__(self, words: list[str], pid: int, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.words, self.pid, self._folder = words, pid, folder

    def poll(self) -> int | None:
        """The exit status; None while it is there."""
        status = Path(self._folder.name, "status")
        return int(status.read_text()) if status.exists() else None

    def said(self) -> str:
        """Its standard output so far."""
        return Path(self._folder.name, "out").read_text()

    def send_signal(self, number: int) -> None:
        """As of `subprocess.Popen`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def done(self) -> subprocess.CompletedProcess[str]:
        """Waits for it: exit status, standard output and errors."""
        try:
            while (status := self.poll()) is None:
                time.sleep(0.005)
        except BaseException:  # a limit of time: the program must not outlive its test
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise
        out, err = (Path(self._folder.name, name).read_text() for name in ("out", "err"))
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.words, status, out, err)


def pair(work: Callable[..., None], *args: Any) -> None:
    """Calls `work(rank, *args)` in two processes forked from this one, and waits for both.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one failed; the other is ended.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.start_processes(work, args, nprocs=2, start_method="fork")


def _started(env: dict[str, str]) -> subprocess.Popen[str]:
    global _nursery
    if _nursery is None or _nursery.poll() is not None:
        command = [sys.executable, "-c", "from tests.forked import _serve; _serve()"]
        paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
        environ = {**env, "PYTHONPATH": os.pathsep.join(paths)}
        _nursery = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_nursery.stdin.close)  # it ends when nobody can ask it any more
    return _nursery


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_heavy()
    path = [entry for entry in sys.path if entry]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(json.loads(line), answers, path)
            os._exit(0)


def _keep(request: dict[str, Any], answers: Any, path: list[str]) -> None:
    """Starts a program and writes its exit status where it was asked for."""
    agent = os.fork()
    if agent == 0:
        os.setsid()
        answers.close()
        _enter(request, path)
        count = request["processes"]
        status = _several(request["words"], count) if count else _program(request["words"])
        os._exit(status)
    print(agent, file=answers, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1])
    with contextlib.suppress(FileNotFoundError):  # a test that failed has not waited
        half = Path(request["status"] + "_half")
        half.write_text(str(status))
        half.rename(request["status"])


def _import_heavy() -> None:
    import hydra.main  # noqa: F401
    import mmengine.runner  # noqa: F401
    import torch.distributed.fsdp
    import torch.utils.tensorboard  # noqa: F401

    import core.engine.launch
    import core.engine.runner  # noqa: F401


def _enter(request: dict[str, Any], path: list[str]) -> None:
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(request[name], os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"], resource.RLIM_INFINITY))
    more = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    script = request["words"][0]
    beside = request["cwd"] if script in _FLAGS else str(Path(script).resolve().parent)
    sys.path[:] = [beside, *filter(None, more), *path]


def _program(words: list[str]) -> int:
    flag = words[0] if words[0] in _FLAGS else None
    sys.argv = list(words[1:] if flag else words)
    status: Any = 0
    try:
        if flag == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif flag == "-c":
            exec(compile(words[1], "<forked>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        status = error.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    return status or 0


def _several(words: list[str], count: int) -> int:
    """As torchrun --standalone does: the store is the launcher's, so that no port is chosen before it is bound."""
    reading, writing = os.pipe()
    ranks = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": os.read(reading, 16).decode().strip(),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "forked",
            }  # fmt: skip
            os._exit(_program(words))
        ranks.append(child)
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(writing, b"".join(f"{store.port:<16}".encode() for _ in range(count)))
    worst = 0
    while ranks:
        child, status = os.wait()
        ranks.remove(child)
        if status and not worst:
            worst = 1
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return worst
