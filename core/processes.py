"""Work that several processes share: where one fails, none is left waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from core.errors import VitrineError


@contextmanager
def all_or_none(work: str) -> Iterator[None]:
    """Around a process's share of some work: afterwards every process waits for the others, and fails where one did.

    A process that failed raises its own error. Inside, processes must not wait for each other.

    Args:
        work: what is done, for the message: `filling the cache`.

    Raises:
        VitrineError: another process failed; the message has its number and its error.
    """
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
