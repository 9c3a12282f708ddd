"""A hundred and more weight files that no tool may read: attacks, bombs, damage, and files of another kind.

`FILES` maps a name to a `Hostile`, which writes the file. Content that would execute something leaves a mark in the
folder that it is given, so that it shows.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import operator
import os
import random
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.hostile.builders import (
    MEGABYTE,
    Calls,
    array,
    call,
    doubled,
    legacy,
    legacy_tensor,
    named,
    npy,
    npz,
    number,
    pickled,
    replaced,
    safetensors,
    saved,
    state,
    storage,
    swollen,
    tensor,
    text,
    torch_zip,
    tuple_of,
    weights,
)

#: Every way to read weights.
READERS = ("load", "load_official", "load_weights", "convert", "infer", "test", "train")
# What is read as data, but holds no weights that fit a model.
_USERS = ("load_weights", "convert", "infer", "test", "train")


@dataclass(frozen=True)
class Hostile:
    """One file.

    Attributes:
        write: makes it at a path; gets the mark that nothing in it may leave.
        suffix: of its name.
        readers: which of `READERS` refuse it.
        reason: a part of every message.
    """

    write: Callable[[Path, Path], None]
    suffix: str = ".pth"
    readers: tuple[str, ...] = READERS
    reason: str = ""


FILES: dict[str, Hostile] = {}


def _add(name: str, content: bytes | Callable[[], bytes], suffix: str = ".pth", **about: Any) -> None:
    def write(path: Path, mark: Path) -> None:
        path.write_bytes(content() if callable(content) else content)

    FILES[name] = Hostile(write, suffix, **about)


# --- files that would execute something ------------------------------------------------------------------------------

_ATTACKS: dict[str, Callable[[str], Any]] = {
    "a shell command": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({mark!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({mark!r}, 'w')"),
    "open": lambda mark: Calls(open, mark, "w"),
    "a process": lambda mark: Calls(subprocess.check_output, ["touch", mark]),
    "a partial function": lambda mark: Calls(functools.partial, os.system, f"touch {mark}"),
    "getattr": lambda mark: Calls(getattr, "text", "upper"),
    "a method caller": lambda mark: Calls(operator.methodcaller, "system"),
    "an import": lambda mark: Calls(__import__, "os"),
    "another torch.load": lambda mark: Calls(torch.load, mark),
    "torch.hub": lambda mark: Calls(torch.hub.load, "a", "b"),
    "a call deep inside": lambda mark: {"model": [OrderedDict(a=Calls(os.system, f"touch {mark}"))]},
    "a call as a key": lambda mark: {Calls(os.system, f"touch {mark}"): 1},
    "a default factory": lambda mark: defaultdict(os.getcwd, {}),
}
_FORMS = ("zip", "legacy", 0, 2, 4)


def _attack(make: Callable[[str], Any], form: str | int) -> Callable[[Path, Path], None]:
    def write(path: Path, mark: Path) -> None:
        path.write_bytes(saved(make(str(mark)), form))

    return write


for _index, (_name, _make) in enumerate(_ATTACKS.items()):
    FILES[f"{_name} in a torch file"] = Hostile(_attack(_make, "zip"), reason="was refused")
    _form = _FORMS[1 + _index % 4]
    FILES[f"{_name}, {'older format' if _form == 'legacy' else f'protocol {_form}'}"] = Hostile(
        _attack(_make, _form), reason="was refused"
    )


def _inside_bytes(path: Path, mark: Path) -> None:
    inner = saved(Calls(os.system, f"touch {mark}"), "legacy")
    path.write_bytes(saved({"w": Calls(torch.storage._load_from_bytes, inner)}, 2))


def _renamed_attack(path: Path, mark: Path) -> None:
    path.write_bytes(saved(Calls(os.system, f"touch {mark}"), 2))


FILES["an attack in the bytes of a tensor"] = Hostile(_inside_bytes, reason="was refused")
FILES["an attack called safetensors"] = Hostile(_renamed_attack, ".safetensors")
FILES["an attack called npz"] = Hostile(_renamed_attack, ".npz")
_add("a nested name", pickled(text("collections") + text("OrderedDict.fromkeys") + b"\x93]\x85R"), reason="was refused")
_add("the old instance instruction", b"(S'a'\ncposix\nsystem\n(S'a'\niposix\nsystem\n.", reason="posix.system")
_add("attributes of a class", torch_zip(named("torch.Tensor") + state((text("add"), b"N")) + b"b"))
_add("an extension code", pickled(b"\x82\x01"))
_add("numpy objects", lambda: npz({"a.npy": array("(1,)", "|O", saved([Calls(os.getcwd)], 2))}), ".npz")
_add("a TorchScript archive", lambda: torch_zip(b"}", extra={"archive/constants.pkl": b"", "archive/code/a.py": b""}))

# --- files of another kind -------------------------------------------------------------------------------------------

_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 345\n"
_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>...</body></html>\n"
_ERROR_PAGE = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return out.getvalue()


_add("an empty file", b"", reason="empty")
_add("a Git LFS pointer", _LFS, reason="git lfs pull")
_add("a Git LFS pointer called safetensors", _LFS, ".safetensors", reason="git lfs pull")
_add("a web page", _PAGE, reason="web page")
_add("a web page called npz", _PAGE, ".npz", reason="web page")
_add("an error of a bucket", _ERROR_PAGE, reason="web page")
_add("a run's index", json.dumps({"checkpoints": {}}, indent=1).encode(), ".json", reason="text file")
_add("a run's log", b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.9}\n', ".jsonl", reason="text file")
_add("a run's config", b"name: mine/tiny\nseed: 0\n", ".yaml", reason="text file")
_add("an HDF5 file", b"\x89HDF\r\n\x1a\n" + bytes(100), ".h5", reason="HDF5")
_add("a TensorFlow index", b"\x00\x00\x06model/" + bytes(64), ".ckpt.index", reason="TensorFlow")
_add("TensorFlow's data", bytes(256), ".ckpt.data-00000-of-00001", reason="TensorFlow")
_add("a single numpy array", array(), ".npy", reason="single numpy array")
_add("a compressed file", lambda: gzip.compress(saved({"w": torch.ones(2)})), ".pth.gz", reason="unpack")
_add("a tar archive", _tar, reason="tar archive")
_add("a picture", b"\x89PNG\r\n\x1a\n" + bytes(64), reason="picture")
_add("a GGUF model", b"GGUF\x03\x00\x00\x00" + bytes(64), ".gguf", reason="GGUF")
_add("a zip archive of texts", lambda: npz({"readme.txt": b"hello", "b.txt": b""}), reason="zip archive")
_add("an empty zip archive", lambda: npz({}), reason="zip archive")
_add("prose", b"These are the weights of the model.\n", reason="text file")
_add("random bytes", lambda: random.Random(0).randbytes(4096))
_add("zero bytes", bytes(4096))
FILES["a folder"] = Hostile(lambda path, mark: path.mkdir())
FILES["a pipe"] = Hostile(lambda path, mark: os.mkfifo(path))
FILES["a device"] = Hostile(lambda path, mark: path.symlink_to("/dev/zero"))
FILES["a link to itself"] = Hostile(lambda path, mark: path.symlink_to(path))
FILES["a link to nothing"] = Hostile(lambda path, mark: path.symlink_to(path.with_name("nothing")))
FILES["a name of two lines"] = Hostile(
    lambda path, mark: path.with_name(path.name).write_bytes(_PAGE), "\n\x1b[31m.pth", reason="web page"
)

# --- damage ----------------------------------------------------------------------------------------------------------

_GOOD = {"w": torch.arange(1000.0), "b": torch.ones(3)}
_NUMBERS = torch.arange(1000.0).numpy().tobytes()


def _cut(form: str | int, part: float) -> Callable[[], bytes]:
    def make() -> bytes:
        data = saved(_GOOD, form)
        return data[: int(len(data) * part)]

    return make


def _shifted(mark: bytes, offset: int) -> Callable[[], bytes]:
    """A zip archive with another number in the header that begins with `mark`."""

    def make() -> bytes:
        data = bytearray(torch_zip(weights(tensor())))
        struct.pack_into("<I", data, data.index(mark) + offset, 12_345_678)
        return bytes(data)

    return make


def _encrypted() -> bytes:
    data = bytearray(torch_zip(weights(tensor())))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    return bytes(data)


def _twice() -> bytes:
    data = torch_zip(weights(tensor()), {"0": bytes(16), "1": bytes(16)})
    return data.replace(b"data/1", b"data/0")


_HEADER = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
_OVERLAP = {**_HEADER, "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}
_add("a torch file cut in half", _cut("zip", 0.5))
_add("a torch file without its end", _cut("zip", 0.99))
_add("an older torch file cut in half", _cut("legacy", 0.5))
_add("an older torch file without its end", _cut("legacy", 0.99))
_add("a pickle cut in half", _cut(2, 0.5))
_add("a flipped bit in a tensor", lambda: replaced(saved(_GOOD), _NUMBERS, b"\x01" + _NUMBERS[1:]), reason="CRC")
_add("a directory at a wrong place", _shifted(b"PK\x05\x06", 16))
_add("an entry at a wrong place", _shifted(b"PK\x01\x02", 42))
_add("an entry that is longer than the file", _shifted(b"PK\x01\x02", 20))
_add("an encrypted entry", _encrypted, reason="encrypted")
_add("an entry compressed with bzip2", lambda: torch_zip(weights(tensor()), compression=zipfile.ZIP_BZIP2))
_add("two entries of one name", _twice, reason="two entries")
_add("a tensor without its entry", lambda: torch_zip(weights(tensor()), {}))
_add("another byte order", lambda: torch_zip(weights(tensor())).replace(b"little", b"middle"))
_add("no instructions", torch_zip(b""))
_add("a stack that is empty", torch_zip(b"0000R"))
_add("a memo that is empty", torch_zip(b"h\x07"))
_add("an unknown instruction", pickled(b"\xff\xfe"))
_add("a frame that is too long", pickled(b"\x95" + struct.pack("<Q", 1 << 60) + b"N"))
_add("bytes that are too long", pickled(b"\x8e" + struct.pack("<Q", 1 << 60)))
_add("a byte array that is too long", pickled(b"\x96" + struct.pack("<Q", 1 << 40)))
_add("a number of negative length", pickled(b"\x8b" + struct.pack("<i", -5)))
_add("an older file that lacks its numbers", legacy(weights(legacy_tensor(4)), keys=(), tail=b""))
_add("safetensors cut off", safetensors(_HEADER, bytes(7)), ".safetensors")
_add("a safetensors header of 2^60 bytes", safetensors(_HEADER, length=1 << 60), ".safetensors")
_add("a safetensors header of 100 MB", lambda: safetensors(b"{" + b" " * 100 * MEGABYTE + b"}"), ".safetensors")
_add("a safetensors header that is not JSON", safetensors(b'{"a": nonsense'), ".safetensors")
_add("safetensors that overlap", safetensors(_OVERLAP, bytes(24)), ".safetensors")
_add("safetensors of an unknown type", safetensors({"a": {**_HEADER["a"], "dtype": "F33"}}), ".safetensors")
_add("safetensors of a negative size", safetensors({"a": {**_HEADER["a"], "shape": [-4]}}), ".safetensors")
_add("an npz file cut in half", lambda: npz({"a.npy": array(data=bytes(4000), shape="(1000,)")})[:2000], ".npz")
_add("an npz array that is too short", lambda: npz({"a.npy": array(data=bytes(12))}), ".npz")
_add("an npz array of a negative size", lambda: npz({"a.npy": array("(-4,)")}), ".npz")
_add("an npz array of 2^62 numbers", lambda: npz({"a.npy": array(f"({1 << 62},)")}), ".npz")
_add("an npz header of 8 MB", lambda: npz({"a.npy": npy(" " * 8 * MEGABYTE, version=2)}), ".npz")
_add("an npz header of many brackets", lambda: npz({"a.npy": npy("(" * 9000)}), ".npz")
_add("an npz array of texts", lambda: npz({"a.npy": array("(1,)", "<U4")}), ".npz", reason="not numbers")

# --- tensors that cannot be ------------------------------------------------------------------------------------------

_add("a storage of negative length", torch_zip(weights(tensor(storage(-4)))))
_add("a storage of 2^60 numbers", torch_zip(weights(tensor(storage(1 << 60)))))
_add("a storage whose length is a text", torch_zip(weights(tensor(storage(text("4"))))))
_add("a storage of no known kind", torch_zip(weights(tensor(storage(kind="torch.Tensor")))))
_add("an older storage of 2^40 numbers", legacy(weights(legacy_tensor(1 << 40))))
_add("an older storage of negative length", legacy(weights(legacy_tensor(-4))))
_add("a tensor beyond its storage", torch_zip(weights(tensor(size=(5,)))))
_add("a tensor of negative size", torch_zip(weights(tensor(size=(-4,)))))
_add("a tensor of negative stride", torch_zip(weights(tensor(stride=(-1,)))))
_add("a tensor of 2^70 numbers", torch_zip(weights(tensor(size=(1 << 70,), stride=(0,)))))
_add("a tensor before its storage", torch_zip(weights(tensor(offset=-1))))
_add("a tensor of a text's size", torch_zip(weights(tensor(size=text("abc"), stride=text("abc")))))
_add("a tensor of 10 000 dimensions", torch_zip(weights(tensor(size=(1,) * 10_000, stride=(1,) * 10_000))))
_add("a tensor of nothing", torch_zip(weights(tensor(b"K\x00"))))
_add("a tensor with marks of its own", torch_zip(weights(tensor(metadata=state((text("fake"), b"\x88"))))))
_add("a reference outside", torch_zip(text("../../etc/passwd") + b"Q"), reason="outside itself")
_add("a meta tensor", lambda: saved({"w": torch.ones(2, device="meta")}), reason="meta")
_add("a sparse tensor", lambda: saved({"w": torch.ones(2).to_sparse()}), reason="to_dense")
_QUANTIZED = call("torch._utils._rebuild_qtensor", storage(kind="torch.QInt8Storage"))
_add("a quantized tensor", torch_zip(weights(_QUANTIZED)), reason="dequantize")
_BITS = call(
    "torch._utils._rebuild_tensor_v3",
    storage(16, kind="torch.storage.UntypedStorage"), b"K\x00", tuple_of(number(16)), tuple_of(number(1)),
    b"\x89", b"N", named("torch.bits8"),
)  # fmt: skip
_add("a tensor of bits", torch_zip(weights(_BITS)))

# --- bombs -----------------------------------------------------------------------------------------------------------

_HUGE = 3 << 30
_add(
    "a torch file that unpacks to 3 GB",
    lambda: swollen(
        torch_zip(weights(tensor(storage(_HUGE // 4), size=(_HUGE // 4,))), {}), "archive/data/0", b"", _HUGE
    ),
    reason="memory",
)
_add(
    "an npz file that unpacks to 3 GB",
    lambda: swollen(npz({}), "a.npy", array(f"({_HUGE // 4},)", data=b""), _HUGE),
    ".npz",
    reason="memory",
)
_add(
    "instructions that unpack to 3 GB",
    lambda: swollen(npz({"archive/version": b"3"}), "archive/data.pkl", b"\x80\x02B" + struct.pack("<I", _HUGE), _HUGE),
    reason="memory",
)
_add("one number as a tensor of 4 TB", torch_zip(weights(tensor(size=(1 << 40,), stride=(0,)))), reason="memory")
_add(
    "four megabytes as 1000 tensors of 4 MB",
    lambda: torch_zip(
        weights(*[tensor(storage(1 << 20), size=((1 << 20) - 1000,), offset=i) for i in range(1000)]),
        {"0": bytes(4 << 20)},
    ),
    reason="memory",
)
_add(
    "a megabyte of bytes copied a million times",
    lambda: pickled(
        b"B" + struct.pack("<I", MEGABYTE) + bytes(MEGABYTE) + b"\x85\x94" + named("builtins.bytearray") + b"\x94"
        + b"](" + b"h\x01h\x00R" * 1_000_000 + b"e"
    ),
    readers=("load_official",),
    reason="memory",
)  # fmt: skip
_add("a byte array of a given length", torch_zip(call("builtins.bytearray", number(1 << 36))))
_add("a set of a range", pickled(call("builtins.set", call("builtins.range", number(1 << 36)))))
_add("a list copied a million times", lambda: pickled(
    b"](" + b"N" * 100_000 + b"e\x85\x94" + named("collections.deque") + b"\x94" + b"](" + b"h\x01h\x00R" * 1_000_000
    + b"e"
), reason="steps", readers=("load_official",))  # fmt: skip
_add("four million empty sets", lambda: torch_zip(b"](" + b"\x8f" * 4_000_000 + b"e"), reason="steps")
_add("a million objects", lambda: pickled(
    named("argparse.Namespace") + b"\x94" + b"](" + b"h\x00)R" * 1_000_000 + b"e"
), readers=("load_official",), reason="steps")  # fmt: skip


def _overlapping(archive: bytes) -> bytes:
    """The archive with a second directory entry of the same large content."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        large = opened.getinfo("archive/data/1")
    out = bytearray(archive)
    start, end = out.index(b"PK\x01\x02"), out.index(b"PK\x05\x06")
    directory = bytes(out[start:end])
    mine = directory[directory.rindex(b"PK\x01\x02", 0, directory.index(b"archive/data/1")) :]
    mine = mine[: mine.index(b"PK\x01\x02", 4)].replace(b"archive/data/1", b"archive/data/2")
    assert large.file_size == 1 << 20
    tail = bytearray(out[end:])
    struct.pack_into("<HHI", tail, 8, *(6, 6, len(directory) + len(mine)))
    return bytes(out[:start]) + directory + mine + bytes(tail)


def _repeated(made: bytes, arguments: bytes, wrap: Callable[[bytes], bytes] = pickled) -> Callable[[], bytes]:
    """Half a million calls of one name with the same arguments."""
    return lambda: wrap(made + b"q\x00" + arguments + b"q\x01" + b"](" + b"h\x00h\x01R" * 500_000 + b"e")


def _inner_file() -> bytes:
    inner = saved({"w": torch.ones(1)})
    return tuple_of(b"B" + struct.pack("<I", len(inner)) + inner)


_TENSOR = named("torch._utils._rebuild_tensor_v2")
_ARGUMENTS = tuple_of(storage(), b"K\x00", tuple_of(number(4)), tuple_of(number(1)), b"\x89", b"N")
_add("half a million tensors of one storage", _repeated(_TENSOR, _ARGUMENTS, torch_zip), reason="steps")
_add(
    "half a million files in a pickle",
    _repeated(named("torch.storage._load_from_bytes"), _inner_file()),
    readers=("load_official",),
    reason="steps",
)
_add("half a million storages", lambda: torch_zip(
    storage()[:-1] + b"q\x00](" + b"h\x00Q" * 500_000 + b"e"
), reason="steps")  # fmt: skip
_add("half a million names", lambda: pickled(
    text("torch") + b"q\x00" + text("float32") + b"q\x01](" + b"h\x00h\x01\x93" * 500_000 + b"e"
), reason="steps")  # fmt: skip
_add("entries that overlap", lambda: _overlapping(torch_zip(weights(tensor()), {"0": bytes(16), "1": bytes(1 << 20)})))
_add("a torch file that unpacks to 20 times its size", lambda: torch_zip(
    b"}", {str(i): bytes(16 << 20) for i in range(10)}, zipfile.ZIP_DEFLATED
), reason="memory")  # fmt: skip
_add("a tuple of tuples as a key", torch_zip(state((doubled(60), b"N"))), reason="nested parts")
_add("a tuple of tuples as a key, DICT", torch_zip(b"(" + doubled(60) + b"Nd"), reason="nested parts")
_add("a tuple of tuples in a set", torch_zip(b"\x8f(" + doubled(60) + b"\x90"), reason="nested parts")
_add("a tuple of tuples in a frozen set", torch_zip(b"(" + doubled(60) + b"\x91"), reason="nested parts")
_add("a tuple of tuples in a set that is called", torch_zip(call("builtins.set", b"](" + doubled(60) + b"e")))
_add("a path of lists of lists", pickled(call("pathlib.PosixPath", doubled(60))), readers=("load_official",))
_add("a tuple of tuples as a value", torch_zip(state((text("w"), doubled(60)))), readers=_USERS)
_PRIME = (1 << 61) - 1
_add("20 000 numbers of one hash as keys", lambda: torch_zip(
    state(*((number(_PRIME * index), b"N") for index in range(1, 20_000)))
), reason="64 bits")  # fmt: skip
_add("20 000 numbers of one hash in the memo", lambda: torch_zip(
    b"N" + b"".join(b"p%d\n" % (_PRIME * index) for index in range(1, 20_000))
), reason="memo")  # fmt: skip


def _colliding_pairs(count: int) -> bytes:
    """Pairs of numbers whose tuples have one hash: CPython's mixing of the two can be undone."""
    first, second, rotation, mask = 11400714785074694791, 14029467366897019727, 31, (1 << 64) - 1
    turn = lambda value, by: ((value << by) | (value >> (64 - by))) & mask  # noqa: E731
    undo = pow(second, -1, 1 << 64)
    target, found, one = 12345, [], 0
    while len(found) < count:
        one += 1
        acc = turn((2870177450012600261 + one * second) & mask, rotation) * first & mask
        two = (target - acc) * undo & mask
        if two < _PRIME:
            found.append(tuple_of(number(one), number(two)))
    return state(*((pair, b"N") for pair in found))


_add("20 000 pairs of one hash as keys", lambda: torch_zip(_colliding_pairs(20_000)), reason="steps")
_add("lists 100 000 deep", lambda: torch_zip(state((text("w"), b"]" * 100_000 + b"a" * 99_999))))

# --- content without weights -----------------------------------------------------------------------------------------

_add("a list", lambda: saved([torch.ones(2)]), readers=("load", *_USERS))
_add("a number", lambda: saved(7), readers=("load", *_USERS))
_add("a dictionary of numbers", lambda: saved({"epoch": 3, "lr": 0.1}), readers=_USERS)
_add("an empty dictionary", lambda: saved({}), readers=_USERS)
_add("a run's checkpoint without its model", lambda: saved({"hooks": {}, "position": {}}), readers=_USERS)
_add("a run's checkpoint of wrong parts", lambda: saved({"hooks": 1, "position": 2, "model": 3}), readers=_USERS)
_add("texts in place of weights", lambda: saved({"state_dict": {"w": "text"}}), readers=_USERS)
_add("arrays of an unknown type", lambda: saved({"w": np.zeros(2, "f4,f4")}, 2), readers=READERS)


def colliding(pairs: bytes) -> bool:
    """Whether the pairs of `_colliding_pairs` do collide in this Python."""
    import pickle

    return len({hash(key) for key in pickle.loads(pickled(pairs))}) == 1
