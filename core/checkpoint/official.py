"""Official checkpoints: pickles that hold more than weights, read as plain data without executing anything."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch

from core.checkpoint.builders import OFFICIAL_GLOBALS, Reference, Storage, StorageKind
from core.checkpoint.files import CheckpointReadError, UnsafeCheckpointError, existing, load, torchscript_error
from core.checkpoint.unpickler import AllowListUnpickler, plain

# First object of torch's older, zip-less format, and the version that follows it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_CHUNK = 1 << 24


def load_official(path: str | os.PathLike[str], allow: Collection[str] = OFFICIAL_GLOBALS) -> Any:
    """Reads a published checkpoint on the CPU: torch files (zip and older), plain pickles, safetensors, npz.

    Configs beside the weights (argparse, yacs, omegaconf, Lightning hyper-parameters, ...) come out as plain
    dictionaries; their classes are never imported. A name added to `allow` is read the same way, as data.

    Args:
        path: the file.
        allow: every name that the file may mention, as ``module.name``.

    Returns:
        The content: usually a dictionary.

    Raises:
        UnsafeCheckpointError: the file mentions another name, or calls an allowed one in a way that cannot be meant.
        CheckpointReadError: missing or damaged.
    """
    path = existing(path)
    if path.suffix in (".safetensors", ".npz"):
        return load(path)
    with open(path, "rb") as file:
        try:
            return plain(_read(file, path, allow))
        except UnsafeCheckpointError as error:
            raise UnsafeCheckpointError(_refusal(path, error)) from None
        except CheckpointReadError:
            raise
        except (
            pickle.UnpicklingError,
            zipfile.BadZipFile,
            struct.error,
            ArithmeticError,
            AttributeError,
            LookupError,
            EOFError,
            MemoryError,
            NotImplementedError,
            RecursionError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointReadError(
                f"'{path}' cannot be read ({reason}): it is damaged, incomplete, or no checkpoint"
            ) from error


def _refusal(path: Path, error: UnsafeCheckpointError) -> str:
    reason = str(error)
    if str(path) in reason:
        return reason
    text = f"'{path}' was refused: {reason}. Nothing in it was executed."
    if "outside the allow-list" in reason:
        text += (
            " If the file comes from a source you trust and its weights are what you need, "
            "load_official(path, allow=OFFICIAL_GLOBALS | {'that.name'}) reads the object as a plain dictionary "
            "(its class is still not imported)."
        )
    return text


def _read(file: BinaryIO, path: Path, allow: Collection[str]) -> Any:
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        return _read_zip(file, path, allow)
    try:
        return _read_stream(file, path, allow, "utf-8")
    except UnicodeDecodeError:  # 8-bit strings of Python 2, among them array contents
        file.seek(0)
        return _read_stream(file, path, allow, "latin1")


def _read_nested(data: bytes, path: Path, allow: Collection[str]) -> Any:
    if not isinstance(data, bytes):
        raise ValueError("no bytes")
    return _read(io.BytesIO(data), path, allow)


def _read_stream(file: BinaryIO, path: Path, allow: Collection[str], encoding: str) -> Any:
    """A plain pickle, or torch's older format, which is a sequence of pickles and raw storages."""

    def unpickle(persistent: Any = None) -> Any:
        nested = lambda data: _read_nested(data, path, allow)  # noqa: E731
        return AllowListUnpickler(file, allow, persistent, nested, encoding=encoding).load()

    first = unpickle()
    if first != _LEGACY_MAGIC:
        return first
    if unpickle() != _LEGACY_VERSION:
        raise CheckpointReadError(f"'{path}' is a torch file of an unknown version")
    system = unpickle()
    if not (isinstance(system, dict) and system.get("little_endian", True)) or sys.byteorder != "little":
        raise CheckpointReadError(f"'{path}' was written with another byte order, which is not read")
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Any:
        kind, *fields = pid
        if kind in ("module", b"module"):  # a class with its source text; only its name is of use
            return fields[0]
        if kind not in ("storage", b"storage") or len(fields) != 5:
            raise UnsafeCheckpointError("it refers to data outside itself")
        storage_kind, key, _, count, view = fields
        storage = _storage(storages, storage_kind, key, count)
        if view is None:
            return storage
        _, offset, length = view
        return Storage(storage.data, storage.dtype, offset, length)

    content = unpickle(persistent)
    for key in unpickle():
        storage = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count * storage.dtype.itemsize != storage.data.numel():
            raise CheckpointReadError(f"'{path}' is damaged: storage {key} has {count} elements")
        _fill(storage.data, file)
    return content


def _read_zip(file: BinaryIO, path: Path, allow: Collection[str]) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointReadError(f"'{path}' is a zip file, but not one that torch wrote")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names or any(n.startswith(f"{folder}code/") for n in names):
            raise torchscript_error(path)
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in names else b"little"
        if order.decode() != sys.byteorder:
            raise CheckpointReadError(f"'{path}' was written with another byte order, which is not read")
        storages: dict[str, Storage] = {}

        def persistent(pid: Any) -> Storage:
            kind, *fields = pid
            if kind not in ("storage", b"storage") or len(fields) != 4:
                raise UnsafeCheckpointError("it refers to data outside itself")
            storage_kind, key, _, count = fields
            known = key in storages
            name = f"{folder}data/{key}"
            if not known and archive.getinfo(name).file_size < count * storage_kind.dtype.itemsize:
                raise CheckpointReadError(f"'{path}' is damaged: storage {key} is too short")
            storage = _storage(storages, storage_kind, key, count)
            if not known and count:
                with archive.open(name) as record:  # checks the record's CRC when it is read to its end
                    _fill(storage.data, record)
                    record.read()
            return storage

        nested = lambda data: _read_nested(data, path, allow)  # noqa: E731
        with archive.open(pickles[0]) as record:
            return AllowListUnpickler(io.BytesIO(record.read()), allow, persistent, nested).load()


def _storage(storages: dict[str, Storage], kind: Reference, key: str, count: int) -> Storage:
    if not isinstance(kind, StorageKind) or type(count) is not int or count < 0:
        raise UnsafeCheckpointError("it refers to a tensor storage of no known kind")
    if key not in storages:
        storages[key] = Storage(torch.empty(count * kind.dtype.itemsize, dtype=torch.uint8), kind.dtype)
    return Storage(storages[key].data, kind.dtype)


def _fill(data: torch.Tensor, file: BinaryIO) -> None:
    view, position = memoryview(data.numpy()), 0
    while position < len(view):
        chunk = file.read(min(_CHUNK, len(view) - position))
        if not chunk:
            raise EOFError("the file ends inside a tensor")
        view[position : position + len(chunk)] = chunk
        position += len(chunk)
