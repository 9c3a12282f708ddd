"""Images inside one zip archive with a list of labels: Swin Transformer's layout for slow disks."""

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from core.config.files import reading
from core.data.errors import data_root
from core.data.sources.files import FilePool, read_labels
from core.data.sources.images import load_image, to_uint8
from core.data.sources.packed import PackedStrings
from core.errors import MissingDataError

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class ImageZip(Dataset):
    """``root/<split>.zip`` and ``root/<split>_map.txt`` with lines ``path inside the archive<TAB>class index``.

    The archive's directory is read once, when the dataset is made; samples are read at their offset, by any number of
    worker processes. Samples are those of :class:`core.data.ImageFolder`.

    Raises:
        MissingDataError: no archive or no list, a malformed line (with its number), or listed images that the archive
            does not hold.
        DataFileError: an archive or a list that cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        split: str,
        transform: Callable[[Any], Any] | None = None,
        prepare: str | None = None,
    ) -> None:
        layout = f"root/{split}.zip\nroot/{split}_map.txt   lines: path/inside/zip.jpg<TAB>class index"
        self.root = data_root(root, what="ImageZip root", layout=layout, prepare=prepare)
        archive, listing = self.root / f"{split}.zip", self.root / f"{split}_map.txt"
        for path in (archive, listing):
            data_root(path, what=f"ImageZip split {split!r}", layout=layout, prepare=prepare, kind="file")
        self.archive, self.listing = str(archive), listing
        self.transform = transform
        names, self.labels = read_labels(listing, "\t", "path<TAB>class index", "image")
        self.files = PackedStrings(names)
        self._entries = _locate(self.archive, names, listing)
        self._pool = FilePool()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = load_image(self._read(index), name=self.describe(index))
        image = self.transform(image) if self.transform is not None else to_uint8(image)
        return {"image": image, "label": int(self.labels[index]), "sample_id": self.files[index]}

    def describe(self, index: int) -> str:
        """Archive and member of a sample."""
        return f"{self.archive}: {self.files[index]}"

    def source_files(self) -> list[str]:
        """The files that samples are read from: the archive and its list."""
        return [self.archive, str(self.listing)]

    def _read(self, index: int) -> bytes:
        start, size, method, checksum = (int(value) for value in self._entries[index])
        header = self._pool.read(self.archive, start, _LOCAL_HEADER.size)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\x03\x04":
            raise OSError(f"{self.describe(index)}: no entry at byte {start}; the archive changed while it was in use")
        data = self._pool.read(self.archive, start + len(header) + name_length + extra_length, size)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        if zlib.crc32(data) != checksum:
            raise OSError(f"{self.describe(index)}: checksum differs, the archive is damaged there")
        return data


def _locate(archive: str, names: list[str], listing: Path) -> np.ndarray:
    """(N, 4) of every name: offset of its local header, stored size, compression method, checksum."""
    with reading(archive, "Copy or make the archive again."), zipfile.ZipFile(archive) as opened:
        directory = {entry.filename: entry for entry in opened.infolist()}
    missing = [name for name in names if name not in directory]
    if missing:
        raise MissingDataError(
            f"{listing} lists {len(missing)} files that {archive} does not hold, first {missing[0]!r} "
            f"(the archive begins with {next(iter(directory), 'nothing')!r})"
        )
    entries = [directory[name] for name in names]
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise MissingDataError(f"{archive}: {entry.filename} is encrypted or neither stored nor deflated")
    rows = [(entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC) for entry in entries]
    return np.array(rows, dtype=np.int64)
