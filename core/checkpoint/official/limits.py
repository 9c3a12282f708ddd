"""What reading one file may cost, so that a small file can neither fill the memory nor run for hours."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from core.checkpoint.files import CheckpointReadError, UnsafeCheckpointError

_MEGABYTE = 1 << 20
# What costs more than an instruction of a pickle, in instructions.
SLOW, NAME, CALL, STORAGE, TENSOR, NESTED = 3, 3, 4, 6, 12, 1000
SPARE = 128 * _MEGABYTE  # what even the smallest file may take
_MAX_DIMENSIONS = 64
_MAX_KEY_PARTS = 32
TOO_LARGE = (
    "its content would take far more memory than its {:,.1f} MB can hold: it is compressed or repeats itself as no "
    "checkpoint does"
)
# Their hashes are random in every process or take few equal values, so nobody can make many of them collide.
_SIMPLE_KEYS = (type(None), bool, float, str, bytes, torch.dtype, torch.device, np.integer, np.floating, np.str_)


class Budget:
    """Bounds on bytes and steps; both grow with the file, and neither depends on the speed of the machine.

    What a file states of its tensors, it holds: stored entries and the numbers of older files are no larger than the
    file, deflated entries may state eight times their size and 128 MB (`core.checkpoint.official.archive` compares
    before it inflates). Beside that content, what is copied, and what different tensors of one storage state beyond its
    size, is bounded by twice the file and 128 MB; not by once the file, because pickles of protocols 0 to 2 hold arrays
    as texts, which are copied twice before they are numbers.

    A pickle takes some sixty steps per tensor (slower instructions count as several); a file of nothing but single
    numbers has a tensor in every 125 bytes, and where there are more than twenty thousand, most are far larger.

    Args:
        size: bytes of the file.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = 2 * size + SPARE
        self.steps = 300_000 + min(size, 2 * _MEGABYTE) // 2 + size // 64
        self._compound_keys = 0
        self._views: dict[int, _Views] = {}

    def take(self, count: int) -> None:
        """Accounts for `count` bytes, before they are allocated.

        Raises:
            CheckpointReadError: the content is far larger than the file.
        """
        self.bytes -= count
        if self.bytes < 0:
            raise CheckpointReadError(TOO_LARGE.format(self.size / 1e6))

    def work(self, count: int) -> None:
        """Accounts for `count` steps.

        Raises:
            CheckpointReadError: reading takes far more steps than a checkpoint of this size needs.
        """
        self.steps -= count
        if self.steps < 0:
            raise CheckpointReadError("reading it takes far more steps than a checkpoint of its size needs")

    def key(self, key: Any) -> None:
        """Accounts for the hash and the comparisons of a dictionary's key or a set's element.

        Whole numbers beyond 64 bits and tuples can be made to collide in any number, and a tuple that holds the same
        tuple twice, and so on, takes 2^depth steps.

        Raises:
            UnsafeCheckpointError: a key that no checkpoint has.
        """
        if isinstance(key, _SIMPLE_KEYS):
            return
        parts, waiting, words = 0, [key], True
        while waiting:
            part = waiting.pop()
            parts += 1
            if parts > _MAX_KEY_PARTS:
                raise UnsafeCheckpointError("it has a key of more than 32 nested parts")
            if isinstance(part, tuple | frozenset):
                waiting.extend(islice(part, _MAX_KEY_PARTS))
            elif type(part) is int:
                words = words and part is key
                if not -(1 << 63) <= part < 1 << 64:
                    raise UnsafeCheckpointError("it has a whole number of more than 64 bits as a key")
            elif not isinstance(part, str):
                words = False
        if not words:
            self.work(self._compound_keys * parts // 16)
            self._compound_keys += 1

    def pairs(self, content: Any) -> list[tuple[Any, Any]]:
        """Key and value of every entry of a dictionary, or of a list of pairs, accounted for."""
        items = content.items() if isinstance(content, dict) else sequence(content)
        self.work(len(items))
        pairs = []
        for key, value in items:
            self.key(key)
            pairs.append((key, value))
        return pairs

    def elements(self, content: Any) -> list[Any]:
        """The elements of a future set, accounted for."""
        self.work(len(sequence(content)))
        for element in content:
            self.key(element)
        return list(content)

    def view(self, memory: torch.Tensor, place: tuple[Any, ...], count: int) -> None:
        """Accounts for a tensor of `count` bytes in a storage.

        Views cost nothing here, but whoever copies them (a conversion, an optimizer) pays for each. Names that share
        one tensor are free; what different views of a storage state beyond its size is taken from the budget.

        Args:
            memory: the storage's bytes.
            place: offset, size, strides and element type.
            count: bytes of the tensor.
        """
        known = self._views.setdefault(id(memory), _Views(memory))
        name = repr(place)  # the hashes of texts cannot be made to collide
        if name not in known.places:
            known.places.add(name)
            before, known.stated = known.stated, known.stated + count
            self.take(max(0, known.stated - max(before, memory.numel())))


@dataclass
class _Views:
    """The tensors of one storage, which is kept, so that its id stays its own."""

    memory: torch.Tensor
    places: set[str] = field(default_factory=set)
    stated: int = 0


def sequence(values: Any) -> Any:
    """The argument of a constructor that would iterate or repeat: only a container that is there counts.

    Raises:
        ValueError: something else.
    """
    if not isinstance(values, list | tuple | set | frozenset | bytes | bytearray | dict):
        raise ValueError("it is not a container")
    return values


def sizes(values: Any) -> tuple[int, ...]:
    """A shape or the strides of a tensor.

    Raises:
        ValueError: more than 64 dimensions, or a number that is not whole, negative or beyond 63 bits.
    """
    if not isinstance(values, list | tuple) or len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"a shape is a list of up to {_MAX_DIMENSIONS} numbers")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in values):
        raise ValueError("sizes and strides are whole numbers from 0 on")
    return tuple(values)
