"""Progress of long work: live bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from core.config.command.messages import console_handlers

T = TypeVar("T")

_PLAIN_EVERY = 30.0  # seconds between two lines of one piece of work


def on_terminal() -> bool:
    """Whether standard output is a terminal that can redraw lines."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


class Progress:
    """Several pieces of work with a bar each, or, without a terminal, a line now and then.

    Args:
        logger: gets the plain lines; while bars are shown, its console lines go above them.
        live: bars instead of lines; None: when standard output is a terminal.
    """

    def __init__(self, logger: logging.Logger | None = None, live: bool | None = None) -> None:
        self.logger = logger
        self.live = on_terminal() if live is None else live
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._plain: dict[str, list[float]] = {}
        self._outer: tuple[Any, Any] = (sys.stdout, sys.stderr)
        self._streams: list[tuple[logging.StreamHandler, Any]] = []
        self._relay: _Relay | None = None

    def begin(self, name: str, total: int | None, done: int = 0) -> None:
        """Starts a piece of work; one of the same name is replaced."""
        self.end(name)
        if not self.live:
            self._plain[name] = [done, total or 0, time.monotonic()]
            return
        if self._bars is None:
            self._start()
        # The rate and the time left count what is done from now on, not what a resumed run found done.
        self._tasks[name] = self._bars.add_task(name, total=total, completed=done, begun=done, note="")

    def advance(self, name: str, steps: int = 1) -> None:
        """Counts steps of a piece of work."""
        if name in self._tasks:
            self._bars.advance(self._tasks[name], steps)
        elif name in self._plain:
            entry = self._plain[name]
            entry[0] += steps
            if time.monotonic() - entry[2] > _PLAIN_EVERY:
                entry[2] = time.monotonic()
                self.say(f"{name}: {int(entry[0])}" + (f" of {int(entry[1])}" if entry[1] else ""))

    def note(self, name: str, text: str) -> None:
        """Sets the text behind a bar (main losses, for example)."""
        if name in self._tasks:
            self._bars.update(self._tasks[name], note=text)

    def end(self, name: str) -> None:
        """Ends a piece of work and removes its bar; the last one puts the terminal back as it was."""
        self._plain.pop(name, None)
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
            if not self._tasks:
                self._stop()

    def say(self, text: str) -> None:
        """One line for the log."""
        if self.logger is not None:
            self.logger.info(text)
        else:
            print(text, flush=True)

    def over(self, work: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
        """Iterates and shows how far."""
        self.begin(name, total if total is not None else len(work) if hasattr(work, "__len__") else None)
        try:
            for item in work:
                yield item
                self.advance(name)
        finally:
            self.end(name)

    def close(self) -> None:
        """Ends everything; safe to call at any time, also twice."""
        for name in list(self._tasks):
            self.end(name)
        self._plain.clear()

    def _start(self) -> None:
        from rich.progress import Progress as Bars

        global _shown
        self._outer = (sys.stdout, sys.stderr)
        errors_too = sys.stderr.isatty()  # a file that takes the errors goes on doing so
        self._bars = Bars(*_columns(), transient=True, refresh_per_second=4, redirect_stderr=errors_too)
        self._bars.start()
        atexit.register(self.close)  # an error on the way out must not leave the terminal without its cursor
        # Console handlers hold the stream that was there before: lines through it would tear the bars.
        for handler in console_handlers(self.logger):
            if handler.stream in self._outer:
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is self._outer[0] else sys.stderr)
        self._relay = _Relay()
        _shown = self

    def _stop(self) -> None:
        global _shown
        _shown = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams.clear()
        self._relay.close()
        self._bars.stop()
        self._bars = None
        atexit.unregister(self.close)

    def _leave(self) -> None:
        """In a forked child: the bars are the parent's, and a lock of theirs may be held by a thread that is not here.

        What the child writes goes to the parent, which prints it above the bars.
        """
        sys.stdout, sys.stderr = self._outer
        for handler, stream in self._streams:
            handler.stream = stream  # setStream would flush through the bars
        self._streams.clear()
        self._bars, self._tasks, self.live = None, {}, False
        atexit.unregister(self.close)
        self._relay.enter()


_shown: Progress | None = None  # whose bars are on the terminal


def _after_fork() -> None:
    global _shown
    shown, _shown = _shown, None
    if shown is not None:
        shown._leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Relay:
    """A pipe through which forked children (a loader's workers) write to the terminal: this process prints lines."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        self._thread = threading.Thread(target=self._print, args=(self._reading,), name="relay", daemon=True)
        self._thread.start()

    @staticmethod
    def _print(reading: int) -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                sys.stderr.write(line)

    def enter(self) -> None:
        """In a child: its standard output and error, warnings of C libraries included, go through the pipe."""
        os.close(self._reading)  # else nobody tells a child that its parent is gone
        for number in (1, 2):
            os.dup2(self._writing, number)

    def close(self) -> None:
        """No further child enters; those that are there still write."""
        os.close(self._writing)
        self._thread.join(0.1)  # ends by itself where there are none


def _columns() -> list[Any]:
    """Name, bar, steps, rate, time left, note; where the line is too short, note, bar and name give way."""
    from rich import progress as rich
    from rich.table import Column
    from rich.text import Text

    class Rate(rich.ProgressColumn):
        """Steps per second, or seconds per step when they are long."""

        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            if not speed:
                return Text("--/s")
            return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")

    class Left(rich.TimeRemainingColumn):
        """The time left, with the word."""

        def render(self, task: Any) -> Text:
            return Text.assemble("left ", super().render(task))

    class Words(rich.ProgressColumn):
        """A text that is cut where there is no room for it; the other texts are not."""

        def __init__(self, of: Callable[[Any], str]) -> None:
            super().__init__(table_column=Column(no_wrap=False))
            self.of = of

        def render(self, task: Any) -> Text:
            return Text(self.of(task), no_wrap=True, overflow="ellipsis")

    return [
        Words(lambda task: task.description),
        rich.BarColumn(bar_width=None, table_column=Column(no_wrap=False, max_width=20)),
        rich.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        Rate(table_column=Column(no_wrap=True)),
        Left(compact=True, table_column=Column(no_wrap=True)),
        Words(lambda task: task.fields["note"]),
    ]
