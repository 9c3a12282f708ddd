"""LSUN scenes and objects: the published LMDB files, or folders of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from core.data import MissingDataError, PackedStrings, data_root, load_image
from core.data.sources.files import IMAGE_EXTENSIONS, files_below
from seqgan.data.lmdb import LMDBError, LMDBReader
from seqgan.data.transforms import TokenizerTransform

# Category -> name of its files; objects such as cats have one file without splits.
CATEGORIES = {"church": "church_outdoor", "bedroom": "bedroom", "cat": "cat"}
_SINGLE = ("cat",)
SPLITS = ("train", "val")


class LSUN(Dataset):
    """`image`, `label` (0) and `sample_id` of one category.

    `root` holds `church_outdoor_train_lmdb/data.mdb` and the like (scenes), `cat/data.mdb` or `cat_lmdb/data.mdb`
    (objects), as they lie after unpacking the published archives; or, with `storage: folder`, a folder of those names
    without `_lmdb`, with pictures at any depth.

    Args:
        root: folder of all categories.
        category: `church`, `bedroom`, `cat`, or another name as the files have it.
        split: `train` or `val`. Objects have one file: `val` is then the last `val_count` pictures.
        transform: of a PIL picture.
        storage: `lmdb` or `folder`.
        val_count: see `split`.

    Raises:
        ValueError: an unknown split or storage.
        core.data.MissingDataError: nothing at the root, or no pictures.
        seqgan.data.lmdb.LMDBError: a damaged file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        category: str = "church",
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        storage: str = "lmdb",
        val_count: int = 5000,
    ) -> None:
        if split not in SPLITS or storage not in ("lmdb", "folder"):
            raise ValueError(
                f"LSUN: split {split!r} must be one of {', '.join(SPLITS)}, storage {storage!r} lmdb or folder"
            )
        self.category, self.split, self.storage = category, split, storage
        self.classes = (category,)
        self.transform = TokenizerTransform(crop="centre") if transform is None else transform
        name, single = CATEGORIES.get(category, category), category in _SINGLE
        stem = name if single else f"{name}_{split}"
        self.path = self._find(root, stem)
        if storage == "lmdb":
            self._reader = LMDBReader(self.path)
            keys, starts, lengths = [], [], []
            for key, start, length in self._reader.places():
                keys.append(key.decode("ascii", "backslashreplace"))
                starts.append(start)
                lengths.append(length)
            self._names, self._starts, self._lengths = PackedStrings(keys), np.array(starts), np.array(lengths)
        else:
            self._names = PackedStrings(files_below(self.path, IMAGE_EXTENSIONS))
        total = len(self._names)
        if total == 0:
            raise MissingDataError(f"LSUN: {self.path} holds no picture; unpack or download it again")
        if single and not 0 < val_count < total:
            raise MissingDataError(
                f"LSUN: val_count={val_count} of {total} pictures of {self.path} leaves a split empty: set "
                "train_dataloader.dataset.val_count (and the others' alike) to fewer"
            )
        self._range = range(total)
        if single:
            self._range = range(total - val_count) if split == "train" else range(total - val_count, total)

    def _find(self, root: str | os.PathLike[str] | None, stem: str) -> Path:
        ending = "_lmdb/data.mdb" if self.storage == "lmdb" else "/<pictures>"
        layout = f"root/{stem}{ending}"
        prepare = None
        if self.storage == "lmdb":
            prepare = f"unpack {stem}_lmdb.zip (objects: {stem}.zip) of LSUN at root"
        parent = data_root(root, what=f"LSUN {self.category}", layout=layout, prepare=prepare)
        names = (f"{stem}_lmdb", stem) if self.storage == "lmdb" else (stem,)
        wanted = (lambda p: (p / "data.mdb").is_file()) if self.storage == "lmdb" else Path.is_dir
        for name in names:
            if wanted(parent / name):
                return parent / name
        data_root(parent / names[0], what=f"LSUN {self.category} {self.split}", layout=layout, prepare=prepare)
        raise MissingDataError(f"LSUN: {parent / names[0]} has no data.mdb; {prepare}")

    def __len__(self) -> int:
        return len(self._range)

    def source_files(self) -> list[str]:
        """The files that images are read from: the LMDB file, or the images of this split."""
        if self.storage == "lmdb":
            return [str(self._reader.path)]
        return [str(self.path / self._names[place]) for place in self._range]

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self._range[index]
        name = self._names[place]
        if self.storage == "lmdb":
            encoded = self._reader.value_at(int(self._starts[place]), int(self._lengths[place]))
            picture = load_image(encoded, name=f"{name} of {self._reader.path}")
        else:
            picture = load_image(self.path / name)
        return {"image": self.transform(picture), "label": 0, "sample_id": name}


__all__ = ["LSUN", "LMDBError"]
