"""Images in one folder per class, as ImageNet is laid out."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from core.data.errors import data_root
from core.data.sources.files import IMAGE_EXTENSIONS, files_below, is_folder, listed
from core.data.sources.images import load_image, to_uint8
from core.data.sources.packed import PackedStrings, load_index, save_index
from core.errors import MissingDataError, nearest

_INDEX_VERSION = 1


class ImageFolder(Dataset):
    """``root/[split/]<class>/**/<image>``; the class index is the place of the folder among the sorted names.

    A sample is ``{"image": transform(PIL RGB image), "label": int, "sample_id": "<class>/.../<image>"}``; without a
    transform the image is uint8 (3, H, W).

    Args:
        root: the folder.
        split: "train", "val", ...: a folder in between.
        transform: from a PIL image to a tensor.
        classes: class folders in index order; others are left out. Default: all of them, sorted.
        extensions: of the files that count as images, lower case.
        index_file: where the file list is kept between runs. It is used as long as no folder has changed, which
            saves walking through a million files on a network disk.
        prepare: the command that makes the folder, for the error when there is none.

    Raises:
        MissingDataError: no such folder (with the config key, the layout, the command), a class without images, or a
            name in ``classes`` without a folder.
        DataFileError: a folder that may not be read, a link that leads back to a folder it lies in, a name that is not
            UTF-8.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        split: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        classes: Sequence[str] | None = None,
        extensions: Sequence[str] = IMAGE_EXTENSIONS,
        index_file: str | os.PathLike | None = None,
        prepare: str | None = None,
    ) -> None:
        place = f"root/{split}/" if split else "root/"
        layout = f"{place}<class>/<image>.jpg (one folder per class; the class index follows the sorted folder names)"
        parent = data_root(root, what=f"{type(self).__name__} root", layout=layout, prepare=prepare)
        self.root = parent / split if split else parent
        data_root(self.root, what=f"{type(self).__name__} split {split!r}", layout=layout, prepare=prepare)
        self.transform = transform
        self.extensions = tuple(extensions)
        self.classes = list(classes) if classes is not None else _class_folders(self.root)
        self._check_classes(layout)
        index = _load_index(index_file, self.root, self.classes, self.extensions)
        if index is None:
            index = _scan(self.root, self.classes, self.extensions)
            if index_file is not None:
                _save_index(index_file, index, self.classes, self.extensions)
        self.files, self.labels = index["files"], index["labels"]
        self._check_counts()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.files[index]
        image = load_image(self.root / name)
        image = self.transform(image) if self.transform is not None else to_uint8(image)
        return {"image": image, "label": int(self.labels[index]), "sample_id": name}

    def describe(self, index: int) -> str:
        """The file of a sample."""
        return str(self.root / self.files[index])

    def source_files(self) -> list[str]:
        """The files that samples are read from, in their order."""
        return [self.describe(index) for index in range(len(self))]

    def _check_classes(self, layout: str) -> None:

        if not self.classes:
            raise MissingDataError(f"{self.root} holds no class folders; expected\n  {layout}")
        missing = [name for name in self.classes if not (self.root / name).is_dir()]
        if missing:
            hint = nearest(missing[0], _class_folders(self.root))
            raise MissingDataError(f"{self.root} has no folder for {len(missing)} classes, first {missing[0]!r}{hint}")

    def _check_counts(self) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if empty:
            folder = self.root / empty[0]
            found = sorted({path.suffix for path in folder.rglob("*") if path.is_file()})
            raise MissingDataError(
                f"{len(empty)} of {len(self.classes)} class folders hold no image, first {folder} "
                f"(file types there: {', '.join(found) or 'none'}; read are {' '.join(self.extensions)})"
            )


def _class_folders(root: Path) -> list[str]:
    return [entry.name for entry in listed(root) if is_folder(entry)]


def _scan(root: Path, classes: Sequence[str], extensions: tuple[str, ...]) -> dict[str, Any]:
    """All images below the class folders, with the folders walked through and when each last changed."""
    files: list[str] = []
    labels: list[int] = []
    folders: dict[str, int] = {}
    for label, name in enumerate(classes):

        def visit(folder: str, status: os.stat_result, name: str = name) -> None:
            folders[f"{name}/{folder}" if folder else name] = status.st_mtime_ns

        found = files_below(root / name, extensions, visit)
        files += [f"{name}/{path}" for path in found]
        labels += [label] * len(found)
    return {"files": PackedStrings(files), "labels": np.array(labels, dtype=np.int32), "folders": folders}


def _save_index(path: str | os.PathLike, index: dict[str, Any], classes: Sequence[str], extensions: tuple) -> None:
    packed = {"classes": PackedStrings(classes), "folders": PackedStrings(index["folders"]), "files": index["files"]}
    save_index(
        path,
        packed,
        version=np.array(_INDEX_VERSION),
        extensions=np.array(" ".join(extensions)),
        labels=index["labels"],
        changed=np.array(list(index["folders"].values()), dtype=np.int64),
    )


def _load_index(
    path: str | os.PathLike | None, root: Path, classes: Sequence[str], extensions: tuple[str, ...]
) -> dict[str, Any] | None:
    """The kept file list; None when there is none, or when it is not that of these folders as they are now."""
    try:
        unpacked, arrays = load_index(path, ("classes", "folders", "files"))
        same = int(arrays["version"]) == _INDEX_VERSION and str(arrays["extensions"]) == " ".join(extensions)
        if not same or list(unpacked["classes"]) != list(classes) or len(unpacked["files"]) != len(arrays["labels"]):
            return None
        for folder, changed in zip(unpacked["folders"], arrays["changed"], strict=True):
            if os.stat(root / folder).st_mtime_ns != changed:
                return None
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # no index, a broken one, a folder that is gone
        return None
    return {"files": unpacked["files"], "labels": arrays["labels"]}
