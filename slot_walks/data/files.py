"""Label maps and lists as they are on disk; errors name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.data import DataFileError, MissingDataError, files
from core.data.files import reading

#: Label of pixels that nobody labelled, in the files of VOC and COCO-Stuff.
VOID = 255


def load_labels(path: str | os.PathLike) -> np.ndarray:
    """A label map `(H, W)` int32: the numbers in the file, whether it has a palette, grey values or 16 bits.

    Raises:
        MissingDataError: no such file.
        DataFileError: not a picture, a broken one, or one of colours; names the file.
    """
    remedy = "Labels are pictures with a palette or of grey values: copy or make it again."
    with reading(path, remedy), Image.open(path) as picture:
        if picture.mode not in ("P", "L", "I", "I;16", "1"):
            raise ValueError(f"its mode is {picture.mode}")
        return np.array(picture).astype(np.int32)


def load_foreground(path: str | os.PathLike, dither: bool = False) -> np.ndarray:
    """A foreground mask `(H, W)` int32, 0 or 1, from grey values: 1 from the middle of their range on.

    Args:
        path: the picture.
        dither: PIL's rule for black-and-white pictures instead, which turns grey areas into dots.

    Raises:
        MissingDataError, DataFileError: see `load_labels`.
    """
    with reading(path), Image.open(path) as picture:
        if dither:
            return np.array(picture.convert("1")).astype(np.int32)
        return (np.array(picture.convert("L")) >= 128).astype(np.int32)


def load_mat(path: Path, what: str) -> dict[str, Any]:
    """The variables of a MATLAB file.

    Raises:
        MissingDataError: no such file.
        DataFileError: a broken one; names it.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise MissingDataError(f"{what}: there is no file {str(path)!r}")
    with reading(path):
        return loadmat(path)


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a list file that are not empty.

    Raises:
        MissingDataError: no such file, or an empty one.
        core.data.DataFileError: it is not UTF-8, or cannot be read.
    """
    if not path.is_file():
        raise MissingDataError(f"{what}: there is no list {str(path)!r}")
    lines = [line for _, line in files.read_lines(path)]
    if not lines:
        raise MissingDataError(f"{what}: the list {str(path)!r} is empty")
    return lines


def read_table(path: Path, columns: int, what: str) -> dict[str, list[str]]:
    """A table of words, one row per line: first word -> the `columns` others.

    Raises:
        MissingDataError: no such file.
        DataFileError: a line of another length; names file and line.
    """
    table = {}
    for number, line in enumerate(read_lines(path, what), start=1):
        first, *others = line.split()
        if len(others) != columns:
            raise DataFileError(f"{path}, line {number}: {line[:200]!r} should have {columns + 1} columns")
        table[first] = others
    return table


def check_size(labels: np.ndarray, size: tuple[int, int], path: str | os.PathLike) -> np.ndarray:
    """`labels`, if they are of the picture's size (width, height).

    Raises:
        ValueError: naming the file.
    """
    if labels.shape != (size[1], size[0]):
        raise ValueError(
            f"{path} is {labels.shape[1]} x {labels.shape[0]}, its picture {size[0]} x {size[1]}: not a pair"
        )
    return labels
