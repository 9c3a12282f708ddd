"""Flax's files of weights, which are MessagePack, read as plain data: neither Flax nor JAX is needed."""

from __future__ import annotations

import struct
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.checkpoint.official.reading import existing
from core.errors import VitrineError, one_line

# Extension types of Flax: an array, and a scalar of numpy, which is packed like one.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    **dict(zip(range(0xCC, 0xD0), (">B", ">H", ">I", ">Q"), strict=True)),
    **dict(zip(range(0xD0, 0xD4), (">b", ">h", ">i", ">q"), strict=True)),
}
_CHUNKED = "__msgpack_chunked_array__"


class FlaxFileError(VitrineError, ValueError):
    """A file that is no whole file of Flax."""


def read_flax(path: str | PathLike[str]) -> dict[str, Tensor]:
    """All arrays of a file by the path to them, joined by dots: `params.encoder.Conv_0.kernel`.

    Raises:
        core.checkpoint.CheckpointReadError: no such file.
        FlaxFileError: it is damaged or something else.
    """
    data = existing(path).read_bytes()
    try:
        reader = _Reader(data)
        content = reader.value()
        if reader.position != len(data):
            raise ValueError(f"{len(data) - reader.position} bytes are left over")
        found = dict(_arrays(content, ""))
    except Exception as error:  # damage shows as any error at all
        raise FlaxFileError(one_line(f"'{path}' is damaged, or not a file of Flax: {error}")) from error
    if not found:
        raise FlaxFileError(f"'{path}' holds no arrays: give the file of a checkpoint")
    return found


def _arrays(content: Any, path: str) -> Any:
    """Pairs of path and tensor."""
    if isinstance(content, np.ndarray):
        yield path, torch.from_numpy(content.copy())
    elif isinstance(content, dict) and _CHUNKED in content:
        shape = [content["shape"][str(i)] for i in range(len(content["shape"]))]
        chunks = [content["chunks"][str(i)] for i in range(len(content["chunks"]))]
        yield path, torch.from_numpy(np.concatenate(chunks).reshape(shape))
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from _arrays(value, f"{path}.{name}" if path else str(name))


class _Reader:
    """One value after the other from bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def value(self) -> Any:
        code = self._number(">B")
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code < 0x90:
            return self._map(code & 0x0F)
        if code < 0xA0:
            return [self.value() for _ in range(code & 0x0F)]
        if code < 0xC0:
            return self._take(code & 0x1F).decode()
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if 0xC4 <= code <= 0xC6:
            return self._take(self._size(code - 0xC4))
        if 0xC7 <= code <= 0xC9:
            return self._extension(self._size(code - 0xC7))
        if 0xD4 <= code <= 0xD8:
            return self._extension(1 << (code - 0xD4))
        if 0xD9 <= code <= 0xDB:
            return self._take(self._size(code - 0xD9)).decode()
        if code in (0xDC, 0xDD):
            return [self.value() for _ in range(self._size(code - 0xDB))]
        if code in (0xDE, 0xDF):
            return self._map(self._size(code - 0xDD))
        raise ValueError(f"byte {code:#x} at {self.position - 1} begins no value")

    def _map(self, count: int) -> dict[Any, Any]:
        return {self.value(): self.value() for _ in range(count)}

    def _size(self, power: int) -> int:
        return self._number((">B", ">H", ">I")[power])

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        piece = self.data[self.position : self.position + count]
        if len(piece) != count:
            raise ValueError("the file ends inside a value")
        self.position += count
        return piece

    def _extension(self, count: int) -> Any:
        kind = self._number(">b")
        payload = self._take(count)
        if kind not in (_ARRAY, _SCALAR):
            return None  # complex numbers and what others define: no weights
        shape, dtype, content = _Reader(payload).value()
        name = dtype.decode() if isinstance(dtype, bytes) else dtype
        if name == "bfloat16":  # numpy lacks it: the upper half of a float32
            return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        kept = np.dtype(name)
        if kept.kind not in "biuf":
            raise ValueError(f"an array of {name}")
        return np.frombuffer(content, kept).reshape(shape)
