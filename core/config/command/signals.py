"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second leaves at once.

Imports nothing heavy: a tool enters `StopRequest` before anything else, so that there is no moment without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import ClassVar

from core.config.command.messages import first_process
from core.config.command.processes import backend_device
from core.errors import VitrineError

_SAME_REQUEST = 0.1  # seconds: a launcher passes on what the terminal has sent to every process already
_AGREEMENT = 0.5  # seconds from one agreement of several processes to the next, at most


class Interrupted(VitrineError):
    """The program was asked to stop; the message says what is saved and how to go on."""


class _StopNow(KeyboardInterrupt):
    """Raised where a signal arrives, as Python does on Ctrl-C; `StopRequest` makes an `Interrupted` of it."""


class StopRequest:
    """Context in which SIGINT and SIGTERM end the program with one clear message.

    At first a signal ends what is going on at once: `Interrupted` with the text `outcome` leaves the context. After
    `defer` it is only noted, and the work asks for it where it can stop: ``requested()`` is the same on every process.
    A second signal leaves the process without anything else.

    Contexts nest; the innermost decides what a signal does. A request outlives the context in which it arrived: what
    an outer one begins next stops, too.

    Args:
        outcome: what is said when a signal ends the work at once: what is kept, and how to go on.
        agree_every: several processes agree on the flag at every n-th call of `requested`, or about twice a second
            where that is more often, since a signal reaches the processes at different moments.
    """

    _contexts: ClassVar[list[StopRequest]] = []  # entered and not left, innermost last
    _signal: int | None = None
    _arrived = 0.0
    _owner = 0  # the process whose handlers these are: a forked child inherits them

    def __init__(self, outcome: str = "stopped", agree_every: int = 10) -> None:
        self.outcome = outcome
        self.agree_every = agree_every
        self.deferring = False
        self._previous: dict[int, object] = {}
        self._calls, self._next_agreement, self._agreed = 0, 1, time.monotonic()

    @classmethod
    def current(cls) -> StopRequest | None:
        """The innermost context, or None outside of any."""
        return cls._contexts[-1] if cls._contexts else None

    def __enter__(self) -> StopRequest:
        if not StopRequest._contexts:
            StopRequest._signal, StopRequest._owner = None, os.getpid()
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # not the main thread: the embedding program handles signals
                    previous = signal.signal(number, _handle)
                    self._previous[number] = _before_start.pop(number, previous)
        StopRequest._contexts.append(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        StopRequest._contexts.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
        if isinstance(error, _StopNow):
            raise Interrupted(self.outcome) from None

    def defer(self) -> None:
        """From here to the end of this context, signals are noted: the work asks `requested` where it can stop."""
        self.deferring = True

    def check(self) -> None:
        """Stops if a signal has arrived.

        Raises:
            Interrupted: with `outcome`.
        """
        if StopRequest._signal is not None:
            raise Interrupted(self.outcome)

    def requested(self, afresh: bool = False) -> bool:
        """Whether to stop. With several processes collective: all of them call it equally often.

        Args:
            afresh: from here on, calls may take longer than they did: agree now.
        """
        torch = sys.modules.get("torch")
        dist = torch.distributed if torch is not None else None
        if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return StopRequest._signal is not None
        self._calls += 1
        if self._calls < self._next_agreement and not afresh:
            return False
        now = time.monotonic()
        seconds = _AGREEMENT if afresh else (now - self._agreed) / self._calls
        agreed = torch.tensor([float(StopRequest._signal is not None), seconds], device=backend_device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        stop, seconds = agreed.tolist()
        self._calls, self._agreed = 0, now
        self._next_agreement = min(self.agree_every, max(1, int(_AGREEMENT / max(seconds, 1e-9))))
        return bool(stop)


_before_start: dict[int, object] = {}  # the handlers that `end_quietly` has replaced


def end_quietly() -> None:
    """From here to the first `StopRequest`, SIGINT and SIGTERM end the process with one line.

    A program calls it before it imports anything heavy: a traceback out of an import says nothing.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        _before_start[number] = signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    if first_process():
        sys.stderr.write("stopped before anything began\n")
        sys.stderr.flush()
    os._exit(2)


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != StopRequest._owner:  # a forked child obeys as if there were no handler
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if StopRequest._signal is not None:
        if time.monotonic() - StopRequest._arrived > _SAME_REQUEST:
            os._exit(128 + number)
        return
    StopRequest._signal, StopRequest._arrived = number, time.monotonic()
    innermost = StopRequest.current()
    if innermost is not None and not innermost.deferring:
        raise _StopNow
