"""What a test costs is said by its marks, and held: `make test-quick` leaves out what starts processes or compiles.

========== ==========================================================================================================
`child`     starts another Python process, or forks one (workers of a loader too)
`processes` starts two at once that wait for each other; implies `child`. Such tests never run beside each other
`compile`   `torch.compile`, `torch.export` or an ONNX export
`long`      takes seconds of processor time: trains whole runs, or builds networks of full size
`slow`      a further case of something that another test checks; only `make test-all` runs it
========== ==========================================================================================================

In a quick run a test that does one of these without its mark fails and says which is missing; other runs warn. Programs
that answer within milliseconds (git, uname) need none. What is long is warned about only: machines differ.
"""

from __future__ import annotations

import functools
import multiprocessing.process
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

MARKS = {
    "child": "starts another Python process",
    "processes": "starts two processes at once that wait for each other",
    "compile": "compiles or exports a model",
    "long": "takes seconds of processor time",
    "slow": "a further case of what another test checks; only `make test-all` runs it",
}
_PROGRAMS = ("python", "torchrun", "lint-imports", "make", "bash", "sh")
_LONG = 4.0  # seconds of this process's time from which on the mark is asked for
_seen: dict[str, str] = {}  # mark -> what the running test did


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.fork":
        _seen.setdefault("child", event)
    elif event in ("subprocess.Popen", "os.posix_spawn"):
        words = args[1] if isinstance(args[1], list | tuple) else str(args[1]).split()
        program = Path(os.fsdecode(words[0])).name if words else ""
        if program.startswith(_PROGRAMS):
            _seen.setdefault("child", f"{event}: {program}")


def _noted(mark: str, call: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def noting(*args: Any, **kwargs: Any) -> Any:
        _seen.setdefault(mark, name)
        return call(*args, **kwargs)

    return noting


def note(mark: str, what: str) -> None:
    """Says that the running test does what a mark stands for, where no event of Python's tells."""
    _seen.setdefault(mark, what)


def watch() -> None:
    """Notices from now on what tests do; called once in every process that runs tests."""
    sys.addaudithook(_audit)
    # Spawned processes of multiprocessing raise no event of their own.
    start = multiprocessing.process.BaseProcess.start
    multiprocessing.process.BaseProcess.start = _noted("child", start, "multiprocessing")
    torch.export.export = _noted("compile", torch.export.export, "torch.export")
    torch.onnx.export = _noted("compile", torch.onnx.export, "torch.onnx")


def _compiled() -> int:
    """Frames that dynamo has translated so far; it is loaded by the first that needs it."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["frames"]["total"] if utils else 0


def held(item: pytest.Item) -> Generator[None, Any, Any]:
    """Wraps a phase of a test: in a quick run it fails where it did what its marks do not say."""
    _seen.clear()
    before, begun = _compiled(), time.process_time()
    result = yield
    spent = time.process_time() - begun
    if spent > _LONG and item.get_closest_marker("long") is None:
        item.warn(pytest.PytestWarning(f"{item.nodeid} took {spent:.1f} s without the mark for it: @pytest.mark.long"))
    if _compiled() > before:
        _seen.setdefault("compile", "torch.compile")
    for mark, what in _seen.items():
        if item.get_closest_marker(mark) is None:
            said = f"{item.nodeid} {MARKS[mark]} ({what}) without the mark for it: @pytest.mark.{mark}"
            if f"not {mark}" in item.config.getoption("markexpr"):
                pytest.fail(said, pytrace=False)
            item.warn(pytest.PytestWarning(said))
    return result


def arrange(items: list[pytest.Item], several: bool) -> None:
    """Adds the marks that follow from others; for `several` workers, groups the tests and puts the dearest first.

    A file's tests stay on one worker, so that what its fixtures made is made once. Those with two processes each
    are one group, since two of them at once would ask for four cores.
    """
    for item in items:
        if item.get_closest_marker("processes"):
            item.add_marker("child")
    if not several:
        return
    cost: dict[str, int] = {}
    for item in items:
        group = "processes" if item.get_closest_marker("processes") else item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
        dear = sum(item.get_closest_marker(mark) is not None for mark in MARKS)
        cost[group] = cost.get(group, 0) + (10000 if group == "processes" else 10 * dear)
    # Groups are handed out in this order; a long one that came last would leave the other workers without work.
    items.sort(key=lambda item: -cost[item.get_closest_marker("xdist_group").args[0]])
