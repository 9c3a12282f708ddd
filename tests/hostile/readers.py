"""Every way in which a user's command reads weights, and one attempt at it in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEGABYTES = 2.0, 1000.0


class Readers:
    """The readers of `tests.hostile.files.READERS` by name, for a tiny experiment in a folder of its own.

    Args:
        folder: for the experiment and for what the tools write.
    """

    def __init__(self, folder: Path) -> None:
        from tests.core.tiny_experiment import EXPERIMENT, PACKAGE

        self.folder = folder
        self.configs = folder / "configs"
        (self.configs / "experiment" / "mine").mkdir(parents=True)
        (self.configs / "experiment" / "mine" / "tiny.yaml").write_text(EXPERIMENT)
        (folder / "mypoints.py").write_text(PACKAGE)
        sys.path.insert(0, str(folder))
        self._words = ["experiment=mine/tiny", f"config_dir={self.configs}", f"runs_dir={folder / 'runs'}"]

    def __getitem__(self, name: str) -> Callable[[Path], Any]:
        return getattr(self, f"_{name}")

    def _load(self, path: Path) -> None:
        from core.checkpoint import load

        load(path)

    def _load_official(self, path: Path) -> None:
        from core.checkpoint import load_official

        load_official(path)

    def _load_weights(self, path: Path) -> None:
        from core.checkpoint.weights import load_weights

        load_weights(nn.Linear(4, 2), path)

    def _convert(self, path: Path) -> None:
        from core.engine.commands.convert import main

        main(["paper=stvit", f"src={path}", f"dst={self.folder / 'converted.pt'}"], "")

    def _infer(self, path: Path) -> None:
        words = [f"checkpoint={path}", f"output={self.folder / 'out'}", "device=cpu", *self._words[:2]]
        _tool("infer").main(words)

    def _test(self, path: Path) -> None:
        _tool("test").main([f"checkpoint={path}", *self._words])

    def _train(self, path: Path) -> None:
        from core.config import compose
        from core.engine.launch import run

        cfg = compose([self._words[0], self._words[2]], self.configs)
        cfg.load_from = str(path)
        run(cfg)


def _tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Outcome:
    """What reading one file came to.

    Attributes:
        status: exit status of the process, negative for a signal.
        errors: what it wrote to standard error.
        seconds: processor time, which other programs on the machine do not change.
        megabytes: peak of its memory, that of torch included.
    """

    status: int
    errors: str
    seconds: float
    megabytes: float

    def fault(self, reason: str) -> str | None:
        """What is wrong with the refusal, or None."""
        lines = [line for line in self.errors.strip().splitlines() if " - mmengine - INFO - " not in line]
        if self.status != 2:
            return f"status {self.status}: {' | '.join(lines[-3:])}"
        if len(lines) != 1 or not lines[0].startswith("error: "):
            return f"{len(lines)} lines: {' | '.join(lines[:3])}"
        if "weights_only" in self.errors or "allow_pickle" in self.errors:
            return f"it recommends an unsafe way: {lines[0]}"
        if reason not in lines[0]:
            return f"not the reason: {lines[0]}"
        if self.seconds > SECONDS or self.megabytes > MEGABYTES:
            return f"{self.seconds:.1f} s, {self.megabytes:.0f} MB"
        return None


def attempt(read: Callable[[Path], Any], path: Path, patience: int = 60) -> Outcome:
    """Reads a file in a fork of this process, as a tool does, and measures it.

    Args:
        read: from `Readers`.
        path: the file.
        patience: seconds after which it is killed.
    """
    log = path.parent / "errors.txt"
    child = os.fork()
    if child == 0:
        _read_and_leave(read, path, log, patience)
    _, status, usage = os.wait4(child, 0)
    errors = log.read_text(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), errors, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def _read_and_leave(read: Callable[[Path], Any], path: Path, log: Path, patience: int) -> None:
    """The child's part; never returns."""
    from core.config.command.cli import run

    status = 1
    try:
        signal.alarm(patience)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115 (until the process ends)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        run(lambda words: read(path))
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
