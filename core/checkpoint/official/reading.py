"""Reads checkpoints, ours and published ones, as plain data: nothing in a file is executed or imported.

One reader serves both: `load` takes files of tensors, numbers and texts, as `save_atomic` writes them; `load_official`
takes what others published, too, with the configs and hyper-parameters beside the weights. Whatever is wrong with a
file, the answer is a `CheckpointReadError` of one line that says what and what to do, after time and memory in
proportion to the file.
"""

from __future__ import annotations

import gc
import io
import mmap
import os
import struct
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import torch

from core.checkpoint.files import CheckpointReadError, UnsafeCheckpointError
from core.checkpoint.official.archive import fill, opened, read_npz
from core.checkpoint.official.builders import OFFICIAL_GLOBALS, PLAIN_GLOBALS, Reference, Storage, StorageKind
from core.checkpoint.official.formats import HEAD, recognised
from core.checkpoint.official.limits import NESTED, Budget
from core.checkpoint.official.unpickler import AllowListUnpickler, plain
from core.errors import close_names

# First object of torch's older, zip-less format, and the version that follows it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MAX_SAFETENSORS_HEADER = 1 << 24


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint that holds nothing but data, on the CPU: torch files, ``.safetensors``, ``.npz``.

    Args:
        path: the file; its content decides the format, not its name.

    Returns:
        The dictionary in the file; ``.npz`` arrays as tensors.

    Raises:
        UnsafeCheckpointError: the file asks for more than data; the message names what.
        CheckpointReadError: missing, damaged, too large for what it holds, or not a dictionary.
    """
    content = _read_file(path, PLAIN_GLOBALS, official=False)
    if not isinstance(content, dict):
        raise CheckpointReadError(
            f"'{path}' holds a {type(content).__name__}, not a dictionary of weights: save a state dict"
        )
    return content


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of a ``.safetensors`` file; none of them is executed.

    Raises:
        CheckpointReadError: no file, or not a whole safetensors file.
    """
    load(path)  # checks the file as a whole, its header's length included
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def load_official(path: str | os.PathLike[str], allow: Collection[str] = OFFICIAL_GLOBALS) -> Any:
    """Reads a published checkpoint on the CPU: torch files (zip and older), plain pickles, safetensors, npz.

    Configs beside the weights (argparse, yacs, omegaconf, Lightning hyper-parameters, ...) come out as plain
    dictionaries; their classes are never imported. A name added to `allow` is read the same way, as data.

    Args:
        path: the file; its content decides the format, not its name.
        allow: every name that the file may mention, as ``module.name``.

    Returns:
        The content: usually a dictionary.

    Raises:
        UnsafeCheckpointError: the file mentions another name, or calls an allowed one in a way that cannot be meant.
        CheckpointReadError: missing, damaged, or too large for what it holds.
    """
    return _read_file(path, allow, official=True)


def existing(path: str | os.PathLike[str]) -> Path:
    """The path, when it is a regular file.

    Raises:
        CheckpointReadError: it is not; files of its folder with a near name are in the message.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            what = f"'{path}' is a folder, not a checkpoint file: give a file in it"
        elif path.exists():
            what = f"'{path}' is a pipe or a device, not a checkpoint file"
        elif path.is_symlink():
            what = f"'{path}' is a link to nothing, or to itself: mend the link"
        elif not path.parent.is_dir():
            what = f"there is no file '{path}': its folder does not exist"
        else:
            near = close_names(path.name, [p.name for p in path.parent.iterdir()][:2000], count=3, cutoff=0.4)
            what = f"there is no file '{path}'" + (f"; near names there: {', '.join(near)}" if near else "")
    except (OSError, ValueError) as error:  # no permission, a name too long, a zero byte in it
        reason = getattr(error, "strerror", None) or error
        what = f"'{path}' cannot be opened: {reason}. Check its name and rights."
    raise CheckpointReadError(what)


def _read_file(path: str | os.PathLike[str], allow: Collection[str], official: bool) -> Any:
    path = existing(path)
    try:
        with open(path, "rb") as file:
            form = recognised(path, file.read(HEAD))
            return _read(file, form, path, allow, official)
    except CheckpointReadError:
        raise
    except OSError as error:
        raise CheckpointReadError(f"'{path}' cannot be read: {error.strerror or error}. Check its rights.") from error


def _read(file: IO[bytes], form: str, path: Path, allow: Collection[str], official: bool) -> Any:
    budget = Budget(os.fstat(file.fileno()).st_size)
    collecting = gc.isenabled()
    gc.disable()  # it would look through the growing content again and again, and find nothing
    try:
        if form == "safetensors":
            return _read_safetensors(file, path, budget.size)
        if form == "zip":
            return plain(_read_zip(file, allow, budget), budget)
        with closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as content:
            return plain(_read_pickles(content, allow, budget, official), budget)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f"'{path}' was refused: {error}. Nothing in it was executed. {_advice(str(error), official)}"
        ) from None
    except CheckpointReadError as error:
        raise CheckpointReadError(f"'{path}' cannot be read: {error}. Copy or download it again.") from None
    except Exception as error:  # damage shows as any error at all
        reason = f"{type(error).__name__}: {error}" if str(error) else "it ends too early"
        raise CheckpointReadError(
            f"'{path}' cannot be read ({reason}): it is damaged, incomplete, or not a checkpoint; copy or download it "
            "again"
        ) from error
    finally:
        if collecting:
            gc.enable()


def _advice(reason: str, official: bool) -> str:
    """What to do about a file that was refused."""
    if "outside the allow-list" in reason and official:
        return (
            "If the file comes from a source you trust and its weights are what you need, "
            "load_official(path, allow=OFFICIAL_GLOBALS | {'that.name'}) reads the object as a plain dictionary "
            "(its class is still not imported); tools/convert.py takes allow=that.name."
        )
    if "outside the allow-list" in reason or "plain pickle" in reason:
        return (
            "If it is an official checkpoint, tools/convert.py and core.checkpoint.load_official(path) read the known "
            "containers (argparse, yacs, omegaconf, numpy, ...) as plain dictionaries; load_official(path, allow=...) "
            "extends their list."
        )
    return "Get it from its publisher again, best as safetensors."


def _read_safetensors(file: IO[bytes], path: Path, size: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    file.seek(0)
    header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > size - 8:
        raise CheckpointReadError("it is not a whole safetensors file: its header is longer than the file")
    if header > _MAX_SAFETENSORS_HEADER:
        raise CheckpointReadError(f"its header of {header / 1e6:,.0f} MB is larger than any checkpoint's")
    return load_file(path)


def _read_nested(budget: Budget, data: Any, allow: Collection[str]) -> Any:
    """A torch file that lies inside a pickle as bytes: a tensor pickled by plain `pickle`."""
    if not isinstance(data, bytes):
        raise ValueError("no bytes")
    budget.work(NESTED)
    file = io.BytesIO(data)
    return _read_zip(file, allow, budget) if data[:2] == b"PK" else _read_pickles(file, allow, budget)


def _read_pickles(file: Any, allow: Collection[str], budget: Budget, official: bool = True) -> Any:
    """A plain pickle, or torch's older format."""
    try:
        return _read_stream(file, allow, budget, "utf-8", official)
    except UnicodeDecodeError:  # 8-bit strings of Python 2, among them array contents
        file.seek(0)
        return _read_stream(file, allow, budget, "latin1", official)


def _read_stream(file: Any, allow: Collection[str], budget: Budget, encoding: str, official: bool) -> Any:
    def unpickle(persistent: Callable[[Any], Any] | None = None) -> Any:
        nested = lambda budget, data: _read_nested(budget, data, allow)  # noqa: E731
        return AllowListUnpickler(file, allow, budget, persistent, nested, encoding=encoding).load()

    first = unpickle()
    if type(first) is not int or first != _LEGACY_MAGIC:
        if not official:
            raise UnsafeCheckpointError("it is a plain pickle, not a file of weights that torch wrote")
        return first
    if unpickle() != _LEGACY_VERSION:
        raise CheckpointReadError("it is a torch file of an unknown version")
    system = unpickle()
    if not (isinstance(system, dict) and system.get("little_endian", True)) or sys.byteorder != "little":
        raise CheckpointReadError("it was written with another byte order, which is not read")
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Any:
        kind, *fields = pid if isinstance(pid, tuple) and pid else (None,)
        if kind in ("module", b"module") and fields:  # a class with its source text; only its name is of use
            return fields[0]
        if kind not in ("storage", b"storage") or len(fields) != 5:
            raise UnsafeCheckpointError("it refers to data outside itself")
        storage_kind, key, _, count, view = fields
        storage = _storage(storages, storage_kind, key, count, budget)
        if view is None:
            return storage
        _, offset, length = view
        return Storage(storage.data, storage.dtype, offset, length)

    content = unpickle(persistent)
    keys = unpickle()
    if not isinstance(keys, list) or {*storages} - {*keys}:
        raise CheckpointReadError("it is damaged: it mentions tensors whose numbers it does not hold")
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count * storage.dtype.itemsize != storage.data.numel():
            raise CheckpointReadError(f"it is damaged: storage {key} has {count} elements")
        fill(storage.data, file)
    return content


def _read_zip(file: IO[bytes], allow: Collection[str], budget: Budget) -> Any:
    """A torch file, or numpy's ``.npz``."""
    with opened(file) as archive:
        names = set(archive.namelist())
        pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if names and all(name.endswith(".npy") for name in names):
            return read_npz(archive)
        if len(pickles) != 1:
            first = min(names, default="nothing")
            raise CheckpointReadError(
                f"it is a zip archive, but not one that torch or numpy wrote (it holds {first}): unpack it first"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names or any(n.startswith(f"{folder}code/") for n in names):
            raise UnsafeCheckpointError(
                "it is a TorchScript archive, which holds a program beside the weights; convert it once, where you "
                "trust it, with torch.save(torch.jit.load(path).state_dict(), ...)"
            )
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in names else b"little"
        if order != sys.byteorder.encode():
            raise CheckpointReadError("it was written with another byte order, which is not read")
        storages: dict[str, Storage] = {}

        def persistent(pid: Any) -> Storage:
            kind, *fields = pid if isinstance(pid, tuple) and pid else (None,)
            if kind not in ("storage", b"storage") or len(fields) != 4:
                raise UnsafeCheckpointError("it refers to data outside itself")
            storage_kind, key, _, count = fields
            if key in storages:
                return _storage(storages, storage_kind, key, count, budget)
            entry = archive.getinfo(f"{folder}data/{key}")
            storage = _storage(storages, storage_kind, key, count, budget, entry.file_size)
            with archive.open(entry) as record:
                fill(storage.data, record)
                record.read(1)  # the end: the checksum is compared there
            return storage

        nested = lambda budget, data: _read_nested(budget, data, allow)  # noqa: E731
        with archive.open(pickles[0]) as record:
            return AllowListUnpickler(io.BytesIO(record.read()), allow, budget, persistent, nested).load()


def _storage(
    storages: dict[str, Storage], kind: Reference, key: Any, count: Any, budget: Budget, there: int | None = None
) -> Storage:
    """The storage of a name, made when it is first mentioned.

    Args:
        storages: those made so far.
        kind: of its elements.
        key: its name in the file.
        count: of its elements, as the file states it.
        budget: pays for the memory, unless it is an entry of an archive, whose size is known to fit.
        there: bytes of its entry in an archive.
    """
    if not isinstance(kind, StorageKind) or type(count) is not int or count < 0 or not isinstance(key, str):
        raise UnsafeCheckpointError("it refers to a tensor storage of no known kind")
    if key not in storages:
        stated = count * kind.dtype.itemsize
        if there is None:
            budget.take(stated)
        elif there != stated:
            raise CheckpointReadError(f"it is damaged: storage {key} states {stated:,} bytes, but {there:,} are there")
        storages[key] = Storage(torch.empty(stated, dtype=torch.uint8), kind.dtype)
    return Storage(storages[key].data, kind.dtype)
