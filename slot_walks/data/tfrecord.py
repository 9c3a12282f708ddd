"""Reading TFRecord files of `tf.train.Example` without TensorFlow.

A record is its length (8 bytes, little endian), a checksum of the length, the bytes and a checksum of these. An Example
is a protocol buffer: a map from feature names to a list of byte strings, floats or integers.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from functools import cache

import numpy as np

from core.config.files import reading
from core.errors import DataFileError

Feature = list[bytes] | np.ndarray

_CASTAGNOLI = 0x82F63B78
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_records(path: str | os.PathLike) -> Iterator[bytes]:
    """The records of a file, one after the other.

    The length's checksum is verified. That of the content is not: it takes a table look-up per byte, and pictures
    inside bring their own.

    Raises:
        core.data.DataFileError: the file ends within a record, or is not a TFRecord file; names file and place.
    """
    with reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while header := file.read(12):
            place = file.tell() - len(header)
            if len(header) < 12:
                raise DataFileError(f"{path} ends within a record, at byte {place}: is it a partial download?")
            length, checksum = struct.unpack("<QI", header)
            if _masked_crc(header[:8]) != checksum:
                raise DataFileError(
                    f"{path} is no TFRecord file, or damaged at byte {place} (checksum of a record's length)"
                )
            if place + 16 + length > size:
                raise DataFileError(f"{path} ends within a record, at byte {place}: is it a partial download?")
            yield file.read(length)
            file.read(4)


def parse_example(record: bytes) -> dict[str, Feature]:
    """Feature name -> byte strings, float32 `(n,)` or int64 `(n,)`.

    Raises:
        ValueError: the bytes are no Example.
    """
    features: dict[str, Feature] = {}
    try:
        for outer, group in _fields(record):
            if outer != 1:
                continue
            for field, entry in _fields(group):
                if field == 1:
                    parts = dict(_fields(entry))
                    features[parts[1].decode()] = _feature(parts.get(2, b""))
    except (IndexError, struct.error, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"the bytes are no tf.train.Example: {error!r}") from error
    return features


def _feature(message: bytes) -> Feature:
    """One of the three lists; values may be packed or one by one."""
    strings: list[bytes] = []
    for kind, content in _fields(message):
        values = [value for field, value in _fields(content) if field == 1]
        if kind == 1:
            strings += values
        elif kind == 2:
            parts = [v if isinstance(v, bytes) else struct.pack("<I", v) for v in values]
            return np.frombuffer(b"".join(parts), "<f4").astype(np.float32)
        elif kind == 3:
            numbers = [n for v in values for n in (_varints(v) if isinstance(v, bytes) else [v])]
            return np.array(numbers, dtype=np.uint64).astype(np.int64)
    return strings


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of the fields of a message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        wire = key & 7
        if wire == _VARINT:
            value, place = _varint(message, place)
        elif wire in (_FIXED32, _FIXED64):
            width = 4 if wire == _FIXED32 else 8
            (value,) = struct.unpack_from("<I" if width == 4 else "<Q", message, place)
            place += width
        elif wire == _BYTES:
            length, place = _varint(message, place)
            if place + length > len(message):
                raise IndexError(f"a field of {length} bytes at {place} in a message of {len(message)}")
            value = message[place : place + length]
            place += length
        else:
            raise TypeError(f"wire type {wire}")
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        if shift > 63:
            raise TypeError("a number of more than 64 bits")
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _varints(packed: bytes) -> list[int]:
    place, values = 0, []
    while place < len(packed):
        value, place = _varint(packed, place)
        values.append(value)
    return values


@cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_CASTAGNOLI if byte & 1 else 0)
        table.append(byte)
    return table


def _masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as the format asks for."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
