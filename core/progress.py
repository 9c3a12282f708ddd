"""Progress of long work: live bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

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
        self._streams: list[tuple[logging.StreamHandler, Any]] = []

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
        from rich import progress as rich

        self._bars = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            _rate_column(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(compact=True),
            rich.TextColumn("{task.fields[note]}"),
            transient=True,
            refresh_per_second=4,
        )
        outer = (sys.stdout, sys.stderr)
        self._bars.start()
        atexit.register(self.close)  # an error on the way out must not leave the terminal without its cursor
        # Console handlers hold the stream that was there before: lines through it would tear the bars.
        for handler in self._console_handlers():
            if handler.stream in outer:
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is outer[0] else sys.stderr)

    def _stop(self) -> None:
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams.clear()
        self._bars.stop()
        self._bars = None
        atexit.unregister(self.close)

    def _console_handlers(self) -> list[logging.StreamHandler]:
        handlers = self.logger.handlers if self.logger is not None else []
        return [h for h in handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]


def _rate_column() -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps per second, or seconds per step when they are long."""

        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            if not speed:
                return Text("--/s")
            return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")

    return Rate()
