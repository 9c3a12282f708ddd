"""Checkpoint files, written whole or not at all, and the errors of writing and reading them."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from core.config.files import replacing
from core.errors import VitrineError, one_line

# What `core.checkpoint.load` gives back, so that nothing is written that could not be read again.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.device, torch.dtype)
_CONTAINERS = (list, tuple, set)
_MAPPINGS = (dict, OrderedDict)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

# Fragments of the messages by which torch's zip writer reports that the stream under it failed.
_WRITER_FAILED = ("PytorchStreamWriter", "inline_container", "iostream error", "write_record")


class CheckpointWriteError(VitrineError, OSError):
    """A file could not be written; what was there before is untouched."""


class CheckpointReadError(VitrineError, ValueError):
    """A file is missing, damaged, or not what its name says.

    The message is one line of printable text, whatever names and paths it quotes: those are a stranger's words.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UnsafeCheckpointError(CheckpointReadError, pickle.UnpicklingError):
    """A file asks for more than data; nothing of it was executed."""


@dataclass(frozen=True)
class FileRecord:
    """What was written: enough to recognise the file as whole later.

    Attributes:
        size: bytes.
        sha256: hexadecimal digest of the content.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileRecord:
        """Reads the file and computes its record."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(os.fstat(file.fileno()).st_size, digest)


class _HashingWriter:
    """A binary file that hashes what passes through it and remembers why a write failed; torch's message does not."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        self.file.flush()


def save_atomic(
    state: Mapping[str, Any], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Writes a checkpoint so that `path` holds either the whole new file or what it held before.

    The bytes go to a temporary name in the same folder, reach the disk (fsync), and only then take the name.
    ``.safetensors`` writes a flat dictionary of tensors in that format, every other suffix a torch file that
    `load` reads back.

    Args:
        state: nested dictionaries, lists, tuples and sets of tensors, numbers, strings; numpy scalars become numbers.
        path: the file; its folder is made when missing.
        metadata: texts for the header of a ``.safetensors`` file; see `core.checkpoint.load_metadata`.

    Raises:
        TypeError: `state` holds something that `load` could not read back (the place is named); or, for
            ``.safetensors``, something that is not a tensor.
        ValueError: `metadata` for another kind of file.
        CheckpointWriteError: the disk is full, a quota or size limit is reached, the folder cannot be written.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        header = {"format": "pt", **(metadata or {})}
        return _replace(path, lambda writer: _write_safetensors(state, writer, header), needed=_tensor_bytes(state))
    if metadata:
        raise ValueError(f"'{path}': only .safetensors files have metadata")
    readable = _readable(state, "state")
    return _replace(path, lambda writer: torch.save(readable, writer), needed=_tensor_bytes(state))


def write_text_atomic(text: str, path: str | os.PathLike[str]) -> FileRecord:
    """Replaces a text file in one step (temporary name, fsync, rename).

    Raises:
        CheckpointWriteError: as `save_atomic`.
    """
    data = text.encode()
    return _replace(Path(path), lambda writer: writer.write(data), needed=len(data))


def is_temporary(name: str) -> bool:
    """Whether a file name is one that an interrupted write leaves behind."""
    return name.startswith(".") and name.endswith(".tmp")


def storable(value: Any) -> Any:
    """A value as numbers, texts, lists and dictionaries of them; None where it is something else."""
    if isinstance(value, Mapping):
        return {str(key): storable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [storable(inner) for inner in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.item() if math.prod(value.shape) == 1 else value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else None


def _replace(path: Path, write: Callable[[_HashingWriter], Any], needed: int) -> FileRecord:
    writer: _HashingWriter | None = None
    try:
        with replacing(path) as file:
            writer = _HashingWriter(file)
            write(writer)
        return FileRecord(writer.size, writer.digest.hexdigest())
    except OSError as error:
        raise _write_error(path, error, needed) from error
    except RuntimeError as error:
        cause = writer.error if writer is not None else None
        if cause is None and not any(sign in str(error) for sign in _WRITER_FAILED):
            raise
        raise _write_error(path, cause or error, needed) from error


def _write_error(path: Path, error: BaseException, needed: int) -> CheckpointWriteError:
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error).split("\n", 1)[0]
    if number == errno.EFBIG:
        reason += " (a file-size limit, see `ulimit -f`)"
    parent = next((p for p in [path.parent, *path.parent.parents] if p.is_dir()), None)
    free = _megabytes(shutil.disk_usage(parent).free) if parent else "unknown"
    kept = "; the previous file is untouched" if path.exists() else ""
    return CheckpointWriteError(
        f"could not write '{path}': {reason}. It needs about {_megabytes(needed)}, {free} are free there{kept}. "
        "Free some space or choose another folder."
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _tensor_bytes(state: Any) -> int:
    """Bytes of all tensor storages in `state`, shared ones counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(state) if t.numel()}
    return sum(storages.values())


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        if state.layout is torch.strided and type(state) in _TENSORS:
            yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, _CONTAINERS):
        for value in state:
            yield from _tensors(value)


def unusual(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being plain numbers in memory: "meta", "sparse", "quantized"; None for ordinary ones."""
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    return None if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.").replace("_", " ")


def _readable(state: Any, place: str) -> Any:
    """`state` itself when `load` can read it back; numpy scalars as numbers; TypeError with the place otherwise."""
    kind = type(state)
    if isinstance(state, torch.Tensor):
        form = unusual(state)
        if form:
            raise TypeError(f"{place} is a {form} tensor, which cannot be read back: store its numbers as a dense one")
        return state
    if kind in _PLAIN:
        return state
    if isinstance(state, np.generic):
        return state.item()
    if kind in _MAPPINGS:
        values = {k: _readable(v, f"{place}[{k!r}]") for k, v in state.items()}
        keys = {k: _readable(k, f"the key {k!r} of {place}") for k in state}
        if all(values[k] is state[k] and keys[k] is k for k in state):
            return state
        return kind((keys[k], v) for k, v in values.items())
    if kind in _CONTAINERS:
        return kind(_readable(v, f"{place}[{i}]") for i, v in enumerate(state))
    raise TypeError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}, which core.checkpoint.load cannot read back: "
        "store it as tensors, numbers, strings, lists and plain dictionaries"
    )


def _write_safetensors(state: Mapping[str, Any], writer: _HashingWriter, header: Mapping[str, str]) -> None:
    from safetensors.torch import save

    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"safetensors holds a flat dictionary of tensors, but '{key}' is a {type(value).__name__}")
    seen: dict[int, str] = {}
    ready = {}
    for key, value in state.items():
        shared = value.numel() > 0 and seen.setdefault(value.untyped_storage().data_ptr(), key) != key
        ready[key] = value.detach().clone() if shared else value.detach().contiguous()
    writer.write(save(ready, metadata=dict(header)))
