"""What a file is by its first bytes, whatever it is called; and what to do about one that holds no weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from core.checkpoint.files import CheckpointReadError

#: How many bytes `recognised` looks at.
HEAD = 1024

Format = Literal["zip", "safetensors", "pickle"]

# First bytes -> what such a file is, and what to do.
_SIGNS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"version https://git-lfs"),
        "is a Git LFS pointer (a text that names the file), not the file: run `git lfs pull` in its repository, or "
        "download it from the page's download link",
    ),
    (
        re.compile(rb"(?i)\s*(<!doctype|<html|<head|<\?xml|<error)"),
        "is a web page, not a file of weights: the download was redirected or needs a login; download it again",
    ),
    (
        re.compile(rb"\x89HDF\r\n"),
        "is an HDF5 file (Keras), which is not read: save its arrays with numpy.savez or safetensors",
    ),
    (re.compile(rb"\x93NUMPY"), "is a single numpy array without a name: save arrays by name with numpy.savez"),
    (re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!"), "is a compressed file: unpack it first"),
    (re.compile(rb"(?s).{257}ustar"), "is a tar archive: unpack it first"),
    (re.compile(rb"GGUF|(?s:.{4})TFL3"), "is a GGUF or TensorFlow Lite model, which is not read"),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|%PDF|\x7fELF"), "is a picture, a document or a program"),
    (
        re.compile(rb"""\s*([{\[]\s*(["{\[}\]\d-]|\Z)|[\w-]+:\s|[#>*A-Za-z][\w'#>*-]* +\w+[ ,.\n])"""),
        "is a text file (JSON, YAML, a log or prose), not a file of weights: give a checkpoint, such as "
        "checkpoints/step_00000100.pt of a run, or the run's folder",
    ),
)
_SAFETENSORS = re.compile(rb'(?s).{7}\0\{\s*["}]')
_TENSORFLOW = re.compile(r"(\.index|\.meta|\.data-\d+-of-\d+|^checkpoint|\.pb)$")


def recognised(path: Path, head: bytes) -> Format:
    """The container format of a file.

    Args:
        path: its name, for TensorFlow's files, which have no sign of their own.
        head: its first `HEAD` bytes.

    Raises:
        CheckpointReadError: empty, or a file of another kind; the message names the kind and the remedy.
    """
    if not head:
        raise CheckpointReadError(f"'{path}' is empty: its download or copy did not finish; get it again")
    if head[:2] == b"PK":
        return "zip"
    if _SAFETENSORS.match(head):
        return "safetensors"
    for sign, what in _SIGNS:
        if sign.match(head):
            raise CheckpointReadError(f"'{path}' {what}")
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix == ".npz":
        raise CheckpointReadError(f"'{path}' is not a whole .npz file: copy or download it again")
    if _TENSORFLOW.search(path.name):
        raise CheckpointReadError(
            f"'{path}' is part of a TensorFlow checkpoint, which is not read: save its variables with numpy.savez"
        )
    return "pickle"
