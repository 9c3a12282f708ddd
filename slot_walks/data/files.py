"""Label maps and lists as they are on disk; errors name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.data import MissingDataError

#: Label of pixels that nobody labelled, in the files of VOC and COCO-Stuff.
VOID = 255


def load_labels(path: str | os.PathLike) -> np.ndarray:
    """A label map `(H, W)` int32: the numbers in the file, whether it has a palette, grey values or 16 bits.

    Raises:
        FileNotFoundError: no such file.
        OSError: no picture, a broken one, or one of colours; names the file.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L", "I", "I;16", "1"):
                raise OSError(f"its mode is {picture.mode}; labels are stored with a palette or as grey values")
            return np.array(picture).astype(np.int32)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read the labels in {path}: {error}") from error


def load_foreground(path: str | os.PathLike, dither: bool = False) -> np.ndarray:
    """A foreground mask `(H, W)` int32, 0 or 1, from grey values: 1 from the middle of their range on.

    Args:
        path: the picture.
        dither: PIL's rule for black-and-white pictures instead, which turns grey areas into dots.

    Raises:
        OSError: see `load_labels`.
    """
    try:
        with Image.open(path) as picture:
            if dither:
                return np.array(picture.convert("1")).astype(np.int32)
            return (np.array(picture.convert("L")) >= 128).astype(np.int32)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read the mask in {path}: {error}") from error


def load_mat(path: Path, what: str) -> dict[str, Any]:
    """The variables of a MATLAB file.

    Raises:
        MissingDataError: no such file.
        OSError: a broken one; names it.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise MissingDataError(f"{what}: there is no file {str(path)!r}")
    try:
        return loadmat(path)
    except Exception as error:  # scipy has error types of its own for broken files, with no common base
        raise OSError(f"cannot read {path}: {error}") from error


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a list file that are not empty.

    Raises:
        MissingDataError: no such file, or an empty one.
    """
    if not path.is_file():
        raise MissingDataError(f"{what}: there is no list {str(path)!r}")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise MissingDataError(f"{what}: the list {str(path)!r} is empty")
    return lines


def read_table(path: Path, columns: int, what: str) -> dict[str, list[str]]:
    """A table of words, one row per line: first word -> the `columns` others.

    Raises:
        MissingDataError: no such file.
        ValueError: a line of another length; names file and line.
    """
    table = {}
    for number, line in enumerate(read_lines(path, what), start=1):
        first, *others = line.split()
        if len(others) != columns:
            raise ValueError(f"{path}, line {number}: {line!r} should have {columns + 1} columns")
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
