"""Zip archives of tensors, torch's and numpy's: nothing is unpacked before its size is known to fit the file."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch

from core.checkpoint.files import CheckpointReadError, UnsafeCheckpointError
from core.checkpoint.official.limits import SPARE, TOO_LARGE, sizes

_CHUNK = 1 << 24
_MAX_RATIO = 8  # of inflated to deflated entries; weights reach 2, masks of zeros more, but are small
_MAX_DIRECTORY = 1 << 23  # bytes of a zip directory: some hundred thousand entries
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class _Pieces(io.RawIOBase):
    """A file from which no piece is read that it does not have, nor a directory of millions of entries."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.limit = file, size, _MAX_DIRECTORY

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.size - self.file.tell())
        count = left if count is None or count < 0 else count
        if count > left:
            raise CheckpointReadError("it is cut off: an entry lies beyond its end")
        if count > self.limit:
            raise CheckpointReadError("its directory of entries is larger than any checkpoint's")
        return self.file.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True


@contextmanager
def opened(file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """The archive, when each entry is stored or deflated and all together state no more than the file can hold.

    Raises:
        CheckpointReadError: they do not.
        zipfile.BadZipFile: damaged.
    """
    pieces = _Pieces(file, file.seek(0, 2))
    with zipfile.ZipFile(pieces) as archive:
        pieces.limit = pieces.size
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise CheckpointReadError("it has two entries of one name")
        for entry in entries:
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise CheckpointReadError(f"its entry '{entry.filename}' is encrypted, or neither stored nor deflated")
        packed = sum(entry.compress_size for entry in entries)
        if packed > pieces.size:
            raise CheckpointReadError("its entries overlap: together they are larger than the file")
        if sum(entry.file_size for entry in entries) > _MAX_RATIO * packed + SPARE:
            raise CheckpointReadError(TOO_LARGE.format(pieces.size / 1e6))
        yield archive


def fill(data: torch.Tensor, file: IO[bytes]) -> None:
    """Reads bytes into a uint8 tensor.

    Raises:
        EOFError: the file ends before.
    """
    view, position = memoryview(data.numpy()), 0
    while position < len(view):
        chunk = file.read(min(_CHUNK, len(view) - position))
        if not chunk:
            raise EOFError("it ends inside a tensor")
        view[position : position + len(chunk)] = chunk
        position += len(chunk)


def read_npz(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """The arrays of an ``.npz`` file as tensors.

    Raises:
        UnsafeCheckpointError: pickled objects.
        CheckpointReadError: an entry that is not an array of numbers, or is damaged.
    """
    tensors = {}
    for entry in archive.infolist():
        with archive.open(entry) as record:
            tensors[entry.filename.removesuffix(".npy")] = _array(record, entry)
            record.read(1)  # the end: the checksum is compared there
    return tensors


def _array(record: IO[bytes], entry: zipfile.ZipInfo) -> torch.Tensor:
    name = entry.filename.removesuffix(".npy")
    try:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(record)](record)
        shape = sizes(shape)
    except (zipfile.BadZipFile, OSError):
        raise
    except Exception:  # whatever the header's text makes of Python's parser
        raise CheckpointReadError(f"the header of its array '{name}' is damaged, or says more than a shape") from None
    if dtype.hasobject:
        raise UnsafeCheckpointError(f"its array '{name}' consists of pickled Python objects, which are not loaded")
    if dtype.kind not in "biufc":
        raise CheckpointReadError(f"its array '{name}' is of type {dtype}, not numbers: leave it out of the file")
    stated = math.prod(shape) * dtype.itemsize
    if stated != entry.file_size - record.tell():
        raise CheckpointReadError(
            f"its array '{name}' states {stated:,} bytes, but {entry.file_size - record.tell():,} are there"
        )
    data = torch.empty(stated, dtype=torch.uint8)
    fill(data, record)
    array: Any = data.numpy().view(dtype).reshape(shape, order="F" if fortran else "C")
    try:
        return torch.from_numpy(array if dtype.isnative else array.astype(dtype.newbyteorder("=")))
    except TypeError as error:
        raise CheckpointReadError(f"its array '{name}' cannot become a tensor: {error}") from None
