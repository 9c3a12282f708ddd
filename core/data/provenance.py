"""What derived data was derived from: hashes of weights and files, and the difference between two records."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20


def _hasher() -> "hashlib._Hash":
    return hashlib.blake2b(digest_size=16)


def hash_state(state_dict: Mapping[str, Any]) -> str:
    """Hash of a state dict's names, types, shapes and values; the order of its entries does not matter."""
    digest = _hasher()
    for name in sorted(state_dict):
        value = state_dict[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def hash_file(path: str | os.PathLike) -> str:
    """Hash of a file's content."""
    digest = _hasher()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(paths: Iterable[str | os.PathLike], root: str | os.PathLike = ".", content: bool = False) -> str:
    """Hash of a list of files, in its order.

    Args:
        paths: relative to ``root``, or absolute below it.
        root: not part of the hash, so that a data set may move.
        content: hash what the files hold; by default their names, sizes and times of change, which is fast and can
            only err by calling equal files different.
    """
    root, digest = Path(root), _hasher()
    for path in paths:
        full = root / path
        name = os.path.relpath(full, root)
        if content:
            digest.update(f"{name} {hash_file(full)}\n".encode())
        else:
            status = os.stat(full)
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def normalised(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """``provenance`` as JSON gives it back.

    Raises:
        TypeError: naming an entry that is no number, string, bool, None, list or dict.
    """

    def refuse(value: Any) -> Any:
        kind = type(value).__name__
        raise TypeError(f"provenance holds a {kind}; give its repr, or a hash (core.data.hash_state, hash_files)")

    return json.loads(json.dumps(provenance, sort_keys=True, default=refuse))


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each entry that differs, as ``transform.size: stored 224, now 256``."""
    before, after = dict(_flat(stored)), dict(_flat(now))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            lines.append(f"{key}: stored {before[key]!r}, now absent")
        elif key not in before:
            lines.append(f"{key}: stored nothing, now {after[key]!r}")
        elif before[key] != after[key]:
            lines.append(f"{key}: stored {before[key]!r}, now {after[key]!r}")
    return lines


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
