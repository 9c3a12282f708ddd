"""Preparation tasks of petl: VTAB-1k from the published data sets without loss, lists of FGVC from their releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.checkpoint import write_text_atomic
from core.config.files import read_lines, reading, replacing
from core.data import DataFileError, MissingDataError
from core.data.prepare import preparer
from core.output.progress import Progress
from petl.data.fgvc import FGVC_TASKS
from petl.data.originals import Original, open_original
from petl.data.vtab import TASKS, task_named
from petl.standin.prepare import cue_source

__all__ = ["cue_source", "fgvc_lists", "vtab_png", "vtab_tensors"]

_PARTS = ("train800", "val200", "test")


@preparer("vtab_png")
def vtab_png(name: str, originals: Path, lists: Path, output: Path) -> str:
    """A task of VTAB-1k in NOAH's layout, as lossless PNG files, from the published data set and lists of numbers.

    OUTPUT/<task>/images/<split>/000000.png and the four lists are written; train800val200.txt names the files of its
    two parts. Images that are there are left alone, so the task goes on after an interruption. Read the result with
    source: png.

    Args:
        name: of the task: cifar, caltech101, dtd, oxford_flowers102, ...
        originals: folder of the published data set; the error of a missing file says what to download. Nothing is
            downloaded.
        lists: folder with train800.txt, val200.txt and test.txt, a number of an image a line, in the order of
            petl.data.originals, and after a blank its class, which is then held against the data set's.
        output: root of VTAB-1k; a folder of the task's name is made in it.

    Raises:
        ConfigError: no such task, or its published files are not read here.
        MissingDataError: files or lists are missing.
        DataFileError: broken files, numbers that do not exist, classes that differ.
    """
    task, original, numbers = _open(name, originals, lists)
    folder = output / task
    for split, chosen in numbers.items():
        lines = []
        for place, number in enumerate(Progress().over(chosen.tolist(), f"{task} {split}")):
            file = folder / "images" / split / f"{place:06d}.png"
            if not file.is_file():
                with replacing(file) as target:
                    original.image(number).save(target, format="png")
            lines.append(f"images/{split}/{place:06d}.png {original.labels[number]}\n")
        _write_lists(folder, split, lines)
    _write_union(folder)
    return _summary(folder, task, numbers)


@preparer("vtab_tensors")
def vtab_tensors(name: str, originals: Path, lists: Path, output: Path) -> str:
    """A task of VTAB-1k as one array of images with lists of its rows, for data whose images are all of one size.

    OUTPUT/<task>/images.npy, uint8, holds the images of train800, val200 and test one after the other, and the lists
    `<row> <class>`. Read the result with source: tensors.

    Args:
        name: see vtab_png.
        originals: see vtab_png.
        lists: see vtab_png.
        output: see vtab_png.

    Raises:
        ConfigError, MissingDataError, DataFileError: see vtab_png; or images of several sizes.
    """
    task, original, numbers = _open(name, originals, lists)
    folder = output / task
    folder.mkdir(parents=True, exist_ok=True)
    first = np.asarray(original.image(int(numbers["train800"][0])))
    # Written aside and renamed at the end: an array that is cut off would read as black images.
    part = folder / ".images.npy.part"
    shape = (sum(len(chosen) for chosen in numbers.values()), *first.shape)
    array = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
    row = 0
    lines: dict[str, list[str]] = {split: [] for split in numbers}
    for split, chosen in numbers.items():
        for number in Progress().over(chosen.tolist(), f"{task} {split}"):
            image = np.asarray(original.image(number))
            if image.shape != first.shape:
                part.unlink()
                raise DataFileError(
                    f"image {number} of {original.what} is {image.shape[1]} x {image.shape[0]}, image "
                    f"{numbers['train800'][0]} {first.shape[1]} x {first.shape[0]}: images of several sizes make no "
                    "array, use task=vtab_png"
                )
            array[row] = image
            lines[split].append(f"{row} {original.labels[number]}\n")
            row += 1
    array.flush()
    del array
    part.replace(folder / "images.npy")
    for split in numbers:
        _write_lists(folder, split, lines[split])
    _write_union(folder)
    return _summary(folder, task, numbers)


def _open(name: str, originals: Path, lists: Path) -> tuple[str, Original, dict[str, np.ndarray]]:
    task = task_named(name)
    numbers = {split: _read_numbers(lists / f"{split}.txt") for split in _PARTS}  # before a large data set is opened
    original = open_original(task, originals)
    for split, (chosen, labels) in numbers.items():
        where = str(lists / f"{split}.txt")
        if chosen.max() >= len(original):
            raise DataFileError(
                f"{where!r} asks for image {chosen.max()}, but {original.what} has {len(original)} (0 to "
                f"{len(original) - 1})"
            )
        if labels is not None:
            original.check_labels(chosen, labels, where)
    return task, original, {split: chosen for split, (chosen, _) in numbers.items()}


def _read_numbers(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers of images and, where the list has them, their classes."""
    if not path.is_file():
        raise MissingDataError(
            f"there is no list {str(path)!r}: lists=FOLDER holds train800.txt, val200.txt and test.txt, with the "
            "number of an image a line"
        )
    rows = []
    for number, line in read_lines(path):
        words = line.split()
        if not (1 <= len(words) <= 2 and all(word.isascii() and word.isdecimal() for word in words)):
            raise DataFileError(
                f"{str(path)!r}, line {number}: expected `<index>` or `<index> <class>`, not {line[:80]!r}"
            )
        rows.append([int(word[:10]) for word in words])
    if not rows or len({len(row) for row in rows}) > 1:
        found = "no line" if not rows else "classes in some lines only"
        raise DataFileError(f"{str(path)!r} has {found}: expected `<index>` or `<index> <class>` in every line")
    table = np.array(rows)
    if len(np.unique(table[:, 0])) < len(table):
        raise DataFileError(f"{str(path)!r} lists an image twice: remove the repeated lines")
    return table[:, 0], table[:, 1] if table.shape[1] == 2 else None


def _write_lists(folder: Path, split: str, lines: list[str]) -> None:
    write_text_atomic("".join(lines), folder / f"{split}.txt")


def _write_union(folder: Path) -> None:
    texts = [(folder / f"{split}.txt").read_text() for split in ("train800", "val200")]
    write_text_atomic("".join(texts), folder / "train800val200.txt")


def _summary(folder: Path, task: str, numbers: dict[str, np.ndarray]) -> str:
    expected = {"train800": 800, "val200": 200, "test": TASKS[task].test}
    parts = [
        f"{split} {len(chosen)}" + ("" if len(chosen) == expected[split] else f" (published: {expected[split]})")
        for split, chosen in numbers.items()
    ]
    return f"{folder}: {', '.join(parts)}"


@preparer("fgvc_lists")
def fgvc_lists(name: Literal["cub", "nabirds", "flowers", "dogs", "cars"], root: Path) -> str:
    """train.json, test.json (and val.json, of Flowers) of a fine-grained data set, from the files of its release.

    Classes are numbered as the release does. Where the release sets no validation images apart, the reader holds a
    tenth of the training images out.

    Args:
        name: cub (images.txt, image_class_labels.txt, train_test_split.txt), nabirds (the same), flowers (setid.mat,
            imagelabels.mat, jpg/), dogs (train_list.mat, test_list.mat), cars (devkit/cars_train_annos.mat,
            cars_test_annos_withlabels.mat).
        root: folder of the unpacked release, which the lists go to.

    Raises:
        MissingDataError: files of the release are missing; nothing is downloaded.
        DataFileError: they are broken.
    """
    try:
        parts = _RELEASES[name](root)
    except MissingDataError as error:
        raise MissingDataError(f"{name}: {error}. root=FOLDER is the unpacked release with {_FILES[name]}") from None
    for split, part in parts.items():
        write_text_atomic(json.dumps(part, indent=0) + "\n", root / f"{split}.json")
    entry, counts = FGVC_TASKS[name], {split: len(part) for split, part in parts.items()}
    published = entry.train + entry.test
    note = "" if sum(counts.values()) == published else f" (published: {published} in all)"
    return f"{root}: " + ", ".join(f"{split} {count}" for split, count in counts.items()) + note


_FILES = {
    "cub": "images.txt, image_class_labels.txt and train_test_split.txt (CUB_200_2011.tgz)",
    "nabirds": "images.txt, image_class_labels.txt and train_test_split.txt (nabirds.tar.gz)",
    "flowers": "setid.mat and imagelabels.mat beside jpg/ (Oxford 102 Flowers)",
    "dogs": "train_list.mat and test_list.mat (lists.tar of Stanford Dogs)",
    "cars": "devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat (Stanford Cars)",
}


def _birds(root: Path) -> dict[str, dict[str, int]]:
    tables = {}
    for name in ("images", "image_class_labels", "train_test_split"):
        path = root / f"{name}.txt"
        tables[name] = table = {}
        for number, line in read_lines(path):
            identity, _, value = line.partition(" ")
            if not value:
                raise DataFileError(f"{str(path)!r}, line {number}: expected an id and a value, not {line[:80]!r}")
            table[identity] = value.strip()
    parts: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    for identity, file in tables["images"].items():
        try:
            label = int(tables["image_class_labels"][identity])
            part = {"1": "train", "0": "test"}[tables["train_test_split"][identity]]
        except (KeyError, ValueError) as error:
            raise DataFileError(
                f"{str(root)!r}: the lists are not of one release: image {identity} of images.txt has no class or "
                f"split ({error!r})"
            ) from None
        parts[part][file] = label
    return parts


def _flowers(root: Path) -> dict[str, dict[str, int]]:
    labels = np.ravel(_matlab(root / "imagelabels.mat", "labels"))
    parts = {}
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        ids = np.ravel(_matlab(root / "setid.mat", key)).astype(int)
        if not len(ids) or ids.min() < 1 or ids.max() > len(labels):
            raise DataFileError(f"{str(root / 'setid.mat')!r} does not belong to imagelabels.mat: download both again")
        parts[split] = {f"jpg/image_{number:05d}.jpg": int(labels[number - 1]) for number in ids}
    return parts


def _dogs(root: Path) -> dict[str, dict[str, int]]:
    parts = {}
    for split in ("train", "test"):
        path = root / f"{split}_list.mat"
        files, labels = np.ravel(_matlab(path, "file_list")), np.ravel(_matlab(path, "labels"))
        with reading(path, "Download it again."):
            parts[split] = {_word(file): int(label) for file, label in zip(files, labels, strict=True)}
    return parts


def _cars(root: Path) -> dict[str, dict[str, int]]:
    parts = {}
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.ravel(_matlab(root / file, "annotations"))
        with reading(root / file, "Download it again."):
            parts[split] = {f"cars_{split}/{_word(row['fname'])}": int(np.ravel(row["class"])[0]) for row in rows}
    return parts


def _word(value: Any) -> str:
    """A text in MATLAB's boxes."""
    return str(np.ravel(value)[0])


def _matlab(path: Path, key: str) -> Any:
    from scipy.io import loadmat

    if not path.is_file():
        raise MissingDataError(f"there is no file {str(path)!r}")
    with reading(path, "Download it again."):
        variables = loadmat(path)
    if key not in variables:
        raise DataFileError(f"{str(path)!r} has no variable {key!r}: it is another file, or broken")
    return variables[key]


_RELEASES = {"cub": _birds, "nabirds": _birds, "flowers": _flowers, "dogs": _dogs, "cars": _cars}
