"""Label maps and lists as they are on disk; errors name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import files
from core.config.files import reading
from core.data import DataFileError, MissingDataError, load_image
from core.data import load_labels as load_labels

Pair = tuple[Image.Image, dict[str, np.ndarray]]
#: Label of pixels that nobody labelled, in the files of VOC and COCO-Stuff.
VOID = 255


def load_foreground(path: str | os.PathLike, dither: bool = False) -> np.ndarray:
    """A foreground mask `(H, W)` int64, 0 or 1: grey values from the middle of their range on, or a map of 0 and 1.

    Args:
        path: the picture.
        dither: PIL's rule for black-and-white pictures instead, which turns grey areas into dots.

    Raises:
        MissingDataError, DataFileError: see `core.data.load_image`; or it is of colours.
    """
    picture = load_image(path)
    pixels = np.asarray(picture)
    if (pixels != pixels[..., :1]).any():
        raise DataFileError(f"{os.fspath(path)!r} is a picture of colours: a foreground mask has grey values")
    if dither:
        return np.asarray(picture.convert("1")).astype(np.int64)
    return (pixels[..., 0] >= (1 if pixels.max() == 1 else 128)).astype(np.int64)


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


def load_pair(picture: str | os.PathLike, **maps: tuple[str | os.PathLike, np.ndarray]) -> Pair:
    """A picture, upright where its label maps are, with them.

    Args:
        picture: its file.
        maps: name -> the map's file and the map `(H, W)`.

    Raises:
        MissingDataError, DataFileError: see `core.data.load_image`.
        ValueError: a map of another size than the picture; names its file.
    """
    sizes = [(labels.shape[1], labels.shape[0]) for _, labels in maps.values()]
    image = load_image(picture, size=sizes[0] if sizes else None)
    return image, {name: check_size(labels, image.size, path) for name, (path, labels) in maps.items()}


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
