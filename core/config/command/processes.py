"""Work that several processes share: where one fails, none is left waiting.

Imports PyTorch when it is asked: configs and folders are read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from core.errors import VitrineError

T = TypeVar("T")


def first_decides(decide: Callable[[], T]) -> T:
    """What `decide` returns on the first process, on all of them; no other process calls it.

    Raises:
        VitrineError: the first process's, on all of them.
    """
    import torch.distributed as dist

    outcome: list = [None, None]
    own: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = [decide(), None]
        except Exception as error:  # the others must not wait for what does not come
            own = error
            said = f"the first process failed: {type(error).__name__}: {error}"
            outcome = [None, error if isinstance(error, VitrineError) else VitrineError(said)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if own is not None:
        raise own
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def all_or_none(work: str) -> Iterator[None]:
    """Around a process's share of some work: afterwards every process waits for the others, and fails where one did.

    A process that failed raises its own error. Inside, processes must not wait for each other.

    Args:
        work: what is done, for the message: `filling the cache`.

    Raises:
        VitrineError: another process failed; the message has its number and its error.
    """
    import torch.distributed as dist

    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    said = None if own is None else f"{type(own).__name__}: {own}"
    everyone: list[str | None] = [said]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, said)
    if own is not None:
        raise own
    for number, failure in enumerate(everyone):
        if failure is not None:
            raise VitrineError(f"{work} ended because process {number} failed: {failure}")


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process has no others: what would wait for them works on what this one has.

    PyTorch's default group is set aside, so that torchmetrics, mmengine and everything else that asks for it find none.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        yield
        return
    joint, dist.group.WORLD = dist.group.WORLD, None
    try:
        yield
    finally:
        dist.group.WORLD = joint


def backend_device() -> str:
    """Where tensors have to lie for all processes to reach them."""
    import torch.distributed as dist

    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def total(number: int) -> int:
    """The sum of a count over all processes. Collective: every process has to call it."""
    return _over_all(number, "SUM")


def largest(number: int) -> int:
    """The largest of a count over all processes. Collective: every process has to call it."""
    return _over_all(number, "MAX")


def _over_all(number: int, operation: str) -> int:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    shared = torch.tensor([number], device=backend_device())
    dist.all_reduce(shared, op=getattr(dist.ReduceOp, operation))
    return int(shared.item())


@contextmanager
def managers_unlocked() -> Iterator[None]:
    """Around work of mmengine: when it fails, the lock of its managers is free again.

    mmengine takes a lock of the whole process to make a logger, say, and keeps it where that raises an error: every
    other thread that builds something would then wait forever.
    """
    from mmengine.utils import manager

    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # this thread no longer holds it
            while True:
                manager._lock.release()
        raise
