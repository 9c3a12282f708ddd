"""Map-style access to tar shards in the webdataset format.

A stream of shards can neither be resumed exactly nor divided without counting samples twice. These shards are indexed
once instead: every member's offset is known, and samples are read in any order by position.
"""

import glob
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log
from torch.utils.data import Dataset

from core.config.files import reading
from core.data.sources.files import IMAGE_EXTENSIONS, FilePool
from core.data.sources.images import load_image
from core.data.sources.packed import PackedStrings, load_index, save_index
from core.errors import MissingDataError

_INDEX_VERSION = 1

_INTEGERS = ("cls", "cls2", "class", "count", "index", "inx", "id")
_TEXTS = ("txt", "text", "transcript")


def decode_member(extension: str, data: bytes, name: str = "member") -> Any:
    """What the bytes of a member stand for, by the last part of its extension.

    Images become RGB PIL images; ``cls``, ``index``, ``count``, ``id`` integers; ``txt`` and ``text`` strings; ``json``
    what it holds; ``npy`` an array, ``npz`` a dict of arrays. Everything else stays bytes: pickles are never opened.
    """
    kind = extension.rpartition(".")[2].lower()
    if f".{kind}" in IMAGE_EXTENSIONS:
        return load_image(data, name=name)
    if kind in _INTEGERS:
        return int(data)
    if kind in _TEXTS:
        return data.decode("utf-8")
    if kind in ("json", "jsn"):
        return json.loads(data)
    if kind == "npy":
        return np.load(io.BytesIO(data), allow_pickle=False)
    if kind == "npz":
        return dict(np.load(io.BytesIO(data), allow_pickle=False))
    return data


class TarShards(Dataset):
    """Samples of tar shards: members of one shard that share a name up to its first dot.

    ``fields`` names what a sample holds, and only that is read::

        TarShards("train-{0000..0146}.tar", fields={"image": "jpg;jpeg;png", "label": "cls"}, transforms={"image": t})

    Without ``fields`` a sample holds every member under its extension. ``sample_id`` is ``<shard>/<key>``.

    Args:
        urls: shards, as one or several patterns: braces ``{0000..0146}`` and ``*`` are expanded. Local files.
        root: folder that relative patterns start from.
        fields: name -> extension, or several, of which the first that a sample has is taken: ``"jpg;png"``.
        transforms: name -> function of the decoded value.
        decode: False leaves bytes as they are.
        index_folder: where the offsets are kept between runs: "beside" each shard, a folder, or None for nowhere. An
            index is used as long as its shard has the same size and time of change.

    Raises:
        MissingDataError: shards that are not there, shards without samples.
        DataFileError: compressed or broken shards.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        root: str | os.PathLike | None = None,
        fields: Mapping[str, str] | None = None,
        transforms: Mapping[str, Callable[[Any], Any]] | None = None,
        decode: bool = True,
        index_folder: str | os.PathLike | None = "beside",
    ) -> None:
        self.shards = _expand(urls, root)
        self.fields = {name: choice.replace(" ", "").split(";") for name, choice in (fields or {}).items()}
        self.transforms = dict(transforms or {})
        self.decode = decode
        if self.fields and set(self.transforms) - set(self.fields):
            unknown = sorted(set(self.transforms) - set(self.fields))
            raise ValueError(f"transforms for {unknown}, which fields {sorted(self.fields)} do not name")
        indices = [_index(shard, index_folder) for shard in self.shards]
        self._keys = [index["keys"] for index in indices]
        self._first = np.cumsum([0, *(len(keys) for keys in self._keys)])
        self._members = [index["members"] for index in indices]
        self._bounds = [index["bounds"] for index in indices]
        self._extensions = [list(index["extensions"]) for index in indices]
        self._pool = FilePool()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = self._place(index)
        members = self._members_of(shard, row)
        chosen = self._choose(members, index) if self.fields else {extension: extension for extension in members}
        sample: dict[str, Any] = {}
        for name, extension in chosen.items():
            value: Any = self._pool.read(self.shards[shard], *members[extension])
            if self.decode:
                value = decode_member(extension, value, name=f"{self.describe(index)}.{extension}")
            transform = self.transforms.get(name)
            sample[name] = value if transform is None else transform(value)
        sample["sample_id"] = f"{Path(self.shards[shard]).stem}/{self._keys[shard][row]}"
        return sample

    def describe(self, index: int) -> str:
        """Shard and key of a sample."""
        shard, row = self._place(index)
        return f"{self.shards[shard]}: {self._keys[shard][row]}"

    def source_files(self) -> list[str]:
        """The files that samples are read from: the shards."""
        return list(self.shards)

    def extensions(self, index: int) -> list[str]:
        """What the sample has, by extension."""
        return list(self._members_of(*self._place(index)))

    def _place(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])

    def _members_of(self, shard: int, row: int) -> dict[str, tuple[int, int]]:
        bounds = self._bounds[shard]
        rows = self._members[shard][bounds[row] : bounds[row + 1]].tolist()
        return {self._extensions[shard][kind]: (offset, size) for kind, offset, size in rows}

    def _choose(self, members: Mapping[str, Any], index: int) -> dict[str, str]:
        chosen = {}
        for name, choice in self.fields.items():
            extension = next((extension for extension in choice if extension in members), None)
            if extension is None:
                raise KeyError(f"{self.describe(index)} has no {' or '.join(choice)} (it has {', '.join(members)})")
            chosen[name] = extension
        return chosen


def _expand(urls: str | Sequence[str], root: str | os.PathLike | None) -> list[str]:
    import braceexpand

    patterns = [urls] if isinstance(urls, str) else list(urls)
    paths: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        for name in braceexpand.braceexpand(pattern):
            path = os.path.join(os.fspath(root), name) if root is not None else name
            found = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.isfile(path) else [path]
            missing += [path] if not found else [item for item in found if not os.path.isfile(item)]
            paths += found
    if missing or not paths:
        first = f", first {missing[0]!r}" if missing else ""
        raise MissingDataError(
            f"tar shards {patterns}: {len(missing)} of {len(paths) or 1} are not there{first}\n"
            "  set      train_dataloader.dataset.urls to local tar files in the webdataset format: members "
            "<key>.<extension>, for example 000001.jpg and 000001.cls; braces as in train-{0000..0146}.tar are expanded"
        )
    if len(set(paths)) < len(paths):
        raise MissingDataError(f"tar shards {patterns}: a shard is named twice, its samples would count twice")
    return paths


def _index(shard: str, folder: str | os.PathLike | None) -> dict[str, Any]:
    """Keys and offsets of one shard, from the kept index while that is valid."""
    with reading(shard):
        status = os.stat(shard)
    stamp = np.array([_INDEX_VERSION, status.st_size, status.st_mtime_ns])
    path = _index_path(shard, folder)
    index = _load_index(path, stamp)
    if index is None:
        index = _build_index(shard)
        if path is not None:
            _save_index(path, stamp, index)
    return index


def _index_path(shard: str, folder: str | os.PathLike | None) -> Path | None:
    if folder is None:
        return None
    if folder == "beside":
        return Path(f"{shard}.index.npz")
    digest = blake2b(os.path.abspath(shard).encode(), digest_size=6).hexdigest()
    return Path(folder) / f"{Path(shard).name}.{digest}.index.npz"


def _build_index(shard: str) -> dict[str, Any]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    # "r:" refuses compressed archives, in which nothing can be found by its offset.
    remedy = "It should be an uncompressed tar file: unpack a compressed one (gunzip) first, or copy it again."
    with reading(shard, remedy), tarfile.open(shard, "r:") as archive:
        for member in archive:
            key, extension = _split(member.name)
            if not member.isreg() or not extension or (member.name[:2] == member.name[-2:] == "__"):
                continue
            sample = samples.setdefault(key, {})
            if extension in sample:
                raise MissingDataError(f"{shard}: {member.name!r} is in the shard twice")
            sample[extension] = (member.offset_data, member.size)
    if not samples:
        raise MissingDataError(f"{shard} holds no samples: no member is called <key>.<extension>")
    extensions = sorted({extension for sample in samples.values() for extension in sample})
    number = {extension: i for i, extension in enumerate(extensions)}
    rows = [(number[ext], offset, size) for sample in samples.values() for ext, (offset, size) in sample.items()]
    return {
        "keys": PackedStrings(samples),
        "extensions": PackedStrings(extensions),
        "members": np.array(rows, dtype=np.int64),
        "bounds": np.cumsum([0, *(len(sample) for sample in samples.values())]),
    }


def _split(name: str) -> tuple[str, str]:
    """``dir/000001.seg.png`` -> ``dir/000001``, ``seg.png``: the format's rule."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (extension.lower() if stem else "")


def _save_index(path: Path, stamp: np.ndarray, index: dict[str, Any]) -> None:
    packed = {key: index[key] for key in ("keys", "extensions")}
    try:
        save_index(path, packed, stamp=stamp, members=index["members"], bounds=index["bounds"])
    except OSError as error:
        # Shared data sets are often read-only, and an index is only a shortcut.
        print_log(f"{path} is not kept ({error}): the shard is indexed anew in every run", "current", logging.WARNING)


def _load_index(path: Path | None, stamp: np.ndarray) -> dict[str, Any] | None:
    try:
        unpacked, arrays = load_index(path, ("keys", "extensions"))
        if not np.array_equal(arrays["stamp"], stamp):
            return None
        return {**unpacked, "members": arrays["members"], "bounds": arrays["bounds"]}
    except (KeyError, TypeError):  # no index, or a broken one
        return None
