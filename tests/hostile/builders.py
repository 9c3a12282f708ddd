"""Pieces of hand-made files: pickle instructions, torch's zip and older format, numpy's and safetensors' headers."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from typing import Any

import torch

MEGABYTE = 1 << 20
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


class Calls:
    """Pickled as a call of `function`; hashable, so that it serves as a key, too."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def text(word: str) -> bytes:
    data = word.encode()
    return b"\x8c" + bytes([len(data)]) + data if len(data) < 256 else b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def named(full: str) -> bytes:
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(full: str, *arguments: bytes) -> bytes:
    return named(full) + tuple_of(*arguments) + b"R"


def state(*pairs: tuple[bytes, bytes]) -> bytes:
    """A dictionary."""
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def storage(count: int | bytes = 4, key: str = "0", kind: str = "torch.FloatStorage") -> bytes:
    size = number(count) if isinstance(count, int) else count
    return tuple_of(text("storage"), named(kind), text(key), text("cpu"), size) + b"Q"


def tensor(
    held: bytes | None = None,
    size: bytes | tuple[int, ...] = (4,),
    stride: bytes | tuple[int, ...] = (1,),
    offset: int = 0,
    metadata: bytes = b"",
) -> bytes:
    numbers = [v if isinstance(v, bytes) else tuple_of(*map(number, v)) for v in (size, stride)]
    held = storage() if held is None else held
    return call("torch._utils._rebuild_tensor_v2", held, number(offset), *numbers, b"\x89", b"N", metadata)


def weights(*values: bytes) -> bytes:
    return state(*((text(f"w{i}"), value) for i, value in enumerate(values)))


def pickled(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def doubled(depth: int, first: bytes = b")", pair: bytes = b"\x86") -> bytes:
    """A tuple that holds the same tuple twice, which holds the same tuple twice, and so on."""
    return first + (b"2" + pair) * depth


def torch_zip(
    body: bytes,
    records: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    folder: str = "archive",
    extra: dict[str, bytes] | None = None,
) -> bytes:
    """A file as torch writes it, around the instructions `body`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickled(body))
        archive.writestr(f"{folder}/byteorder", "little")
        for key, data in (records if records is not None else {"0": bytes(16)}).items():
            archive.writestr(f"{folder}/data/{key}", data)
        archive.writestr(f"{folder}/version", "3\n")
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return out.getvalue()


def legacy(body: bytes, keys: tuple[str, ...] = ("0",), tail: bytes = struct.pack("<q", 4) + bytes(16)) -> bytes:
    """A file as torch wrote it before version 1.6, around the instructions `body`."""
    head = [pickle.dumps(value, 2) for value in (MAGIC, VERSION, {"little_endian": True})]
    return b"".join(head) + pickled(body) + pickle.dumps(list(keys), 2) + tail


def legacy_tensor(count: int, key: str = "0") -> bytes:
    held = tuple_of(
        text("storage"), named("torch.FloatStorage"), text(key), text("cpu"), number(count), b"N"
    ) + b"Q"  # fmt: skip
    return tensor(held)


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    encoded = header.encode()
    return (
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(encoded)) + encoded + data
    )


def npz(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


def array(shape: str = "(4,)", kind: str = "<f4", data: bytes = bytes(16)) -> bytes:
    return npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n", data)


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def saved(content: Any, form: str | int = "zip") -> bytes:
    """What torch (zip, legacy) or pickle (a protocol) writes."""
    if isinstance(form, int):
        return pickle.dumps(content, form)
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=form == "zip")
    return out.getvalue()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1 and len(old) == len(new)
    return data.replace(old, new)


def swollen(archive: bytes, name: str, before: bytes, zeros: int) -> bytes:
    """The archive and one more entry, which unpacks to `before` and `zeros` zero bytes, a thousand times its size."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = squeeze.compress(before) + squeeze.flush(zlib.Z_FULL_FLUSH)
    piece = squeeze.compress(bytes(16 * MEGABYTE)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    packed = start + piece * (zeros // (16 * MEGABYTE)) + squeeze.flush()
    out = io.BytesIO(archive)
    with zipfile.ZipFile(out, "a") as opened:
        opened.writestr(name, packed)
        where = opened.getinfo(name).header_offset
    data = bytearray(out.getvalue())
    entry = data.rindex(b"PK\x01\x02")
    for sizes, method in ((where + 22, where + 8), (entry + 24, entry + 10)):
        struct.pack_into("<I", data, sizes, len(before) + zeros // (16 * MEGABYTE) * 16 * MEGABYTE)
        struct.pack_into("<H", data, method, zipfile.ZIP_DEFLATED)
    return bytes(data)
