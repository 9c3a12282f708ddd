"""Many small tensors as one a kind of number, with their names and shapes in the header.

A tuned network differs from its backbone by some fifty to two hundred small tensors. Kept one by one, their names would
take up to a tenth of a file; together and compressed they take a few hundred bytes.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import load, load_metadata, save_atomic
from core.errors import VitrineError

_MOST = 16 << 20  # bytes of an unpacked header: no honest one is as large


class DeltaError(VitrineError, ValueError):
    """A file of a tuned network cannot be used; the message says why and what to do."""


def write_packed(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], kind: str) -> None:
    """Writes tensors and a header of plain values to a ``.safetensors`` file.

    Args:
        path: the file.
        tensors: by name; whole numbers up to 2**31 are kept in 32 bits.
        header: plain values.
        kind: what the file is, e.g. `petl.delta`; `read_packed` asks for it.

    Raises:
        DeltaError: the name has another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise DeltaError(f"'{path}': name it with the suffix .safetensors")
    groups: dict[str, list[Tensor]] = {}
    index: list[list[Any]] = []
    for name, value in tensors.items():
        stored = value.detach().cpu()
        if stored.dtype == torch.int64 and (not stored.numel() or int(stored.abs().max()) < 2**31):
            stored = stored.to(torch.int32)
        group = str(stored.dtype).removeprefix("torch.")
        groups.setdefault(group, []).append(stored.flatten())
        index.append([name, group, list(value.shape), str(value.dtype).removeprefix("torch.")])
    text = json.dumps({"kind": kind, "header": header, "index": index}, separators=(",", ":"))
    packed = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    save_atomic({group: torch.cat(parts) for group, parts in groups.items()}, path, metadata={"petl": packed})


def read_packed(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_packed` wrote.

    Raises:
        DeltaError: no such file, one of another kind, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise DeltaError(f"no file '{path}'")
    metadata, flat = load_metadata(path), load(path)
    if "petl" not in metadata:
        raise DeltaError(f"'{path}' was not written by petl (its header has {sorted(metadata)})")
    try:
        unpacker = zlib.decompressobj()
        content = json.loads(unpacker.decompress(base64.b85decode(metadata["petl"]), _MOST))
        tensors, at = {}, dict.fromkeys(flat, 0)
        for name, group, shape, dtype in content["index"]:
            size = math.prod(shape)
            part = flat[group][at[group] : at[group] + size]
            tensors[name] = part.view(shape).to(getattr(torch, dtype)).clone()
            at[group] += size
        found, header = content["kind"], content["header"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error) as error:
        raise DeltaError(f"'{path}' is damaged: {error}") from error
    if found != kind:
        raise DeltaError(f"'{path}' is a file of kind '{found}', not '{kind}'")
    return tensors, header
