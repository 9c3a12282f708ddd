"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from core.errors import VitrineError


class Interrupted(VitrineError):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """Context in which SIGINT and SIGTERM set a flag instead of killing the process.

    ``stop.requested(step)`` is the same on every process: with several of them the flag is agreed on every
    `agree_every` steps, since a signal reaches the processes at different steps.
    """

    def __init__(self, agree_every: int = 10) -> None:
        self.agree_every = agree_every
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the embedding program handles signals
                break
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def requested(self, step: int) -> bool:
        """Whether to stop after this step."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.signal is not None
        if step % self.agree_every:
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([float(self.signal is not None)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
