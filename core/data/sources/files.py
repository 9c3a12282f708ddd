"""The folders and files of data sets: which are images, what a list says, and reads at offsets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from core.config.files import read_lines, reading
from core.errors import DataFileError, MissingDataError

if TYPE_CHECKING:
    import numpy as np

#: Endings of files that count as images when a folder is listed, lower case; what a file holds is seen from its bytes.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LARGEST_LABEL = (1 << 31) - 1


def read_labels(path: str | os.PathLike, separator: str | None, form: str, what: str) -> tuple[list[str], np.ndarray]:
    """Names and class indices (int32) of a list with one pair in every line.

    Args:
        path: the list.
        separator: between name and class index; None: the line's last blank, so names may hold blanks.
        form: of a line, for messages.
        what: is listed, for messages.

    Raises:
        MissingDataError: no such file, no line in it, or a line of another form (with its number).
        DataFileError: see `read_text`.
    """
    names, labels = [], []
    for number, line in read_lines(path):
        name, *rest = line.rsplit(separator, 1)
        label = rest[0].strip() if rest else ""
        if not (label.isascii() and label.isdecimal() and int(label[:20]) <= _LARGEST_LABEL):
            raise MissingDataError(f"{os.fspath(path)}, line {number}: expected {form}: {line[:200]!r}")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise MissingDataError(f"{os.fspath(path)} lists no {what}: expected lines of {form}")
    import numpy as np

    return names, np.array(labels, dtype=np.int32)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray] | None:
    """The arrays of an ``.npz`` file that only saves time; None when there is none, or a broken one."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception:  # numpy, zipfile and zlib have error types of their own
        return None


def listed(folder: str | os.PathLike) -> list[os.DirEntry]:
    """The entries of a folder, by name, without hidden ones (.DS_Store, ._photo.jpg) and what macOS packs beside them.

    Raises:
        MissingDataError: there is no such folder.
        DataFileError: it cannot be read, or a name in it is not UTF-8.
    """
    with reading(folder, "Check the rights of the folder."), os.scandir(folder) as found:
        entries = sorted(
            (entry for entry in found if not entry.name.startswith((".", "__MACOSX"))), key=lambda entry: entry.name
        )
    for entry in entries:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise DataFileError(
                f"the name of {os.fsencode(entry.path)!r} is not UTF-8, so that no list or log can hold it: rename it, "
                "for example with `convmv -f latin1 -t utf8 -r --notest`"
            ) from None
    return entries


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one.

    Raises:
        DataFileError: a link to itself, or a place that may not be looked at.
    """
    with reading(entry.path, "Remove or mend the link."):
        return entry.is_dir()


def files_below(
    root: str | os.PathLike,
    extensions: Sequence[str],
    visit: Callable[[str, os.stat_result], None] | None = None,
) -> list[str]:
    """Files with one of the extensions (lower case) at any depth below a folder; relative to it, by name.

    Hidden entries are left out, links to folders are followed.

    Args:
        root: the folder.
        extensions: such as ``(".jpg", ".png")``.
        visit: is called with every folder that is walked through, relative to the root, and its status.

    Raises:
        MissingDataError: there is no such folder.
        DataFileError: a folder that cannot be read, a link that leads back to a folder it lies in, a name that is not
            UTF-8.
    """
    wanted = tuple(extensions)
    found: list[str] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        folder, above = pending.pop()
        place = os.path.join(root, folder)
        with reading(place, "Check the rights of the folder."):
            status = os.stat(place)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise DataFileError(
                f"{place!r} is a link to a folder that it lies in: remove it, its files would never end"
            )
        if visit is not None:
            visit(folder, status)
        for entry in listed(place):
            path = f"{folder}/{entry.name}" if folder else entry.name
            # The name alone decides where it can: asking the file system for a type may cost a call per file.
            if entry.name.lower().endswith(wanted):
                found.append(path)
            elif is_folder(entry):
                pending.append((path, (*above, identity)))
    return sorted(found)


def image_files(folder: str | os.PathLike, deep: bool = False) -> list[str]:
    """Names of the images in a folder, or at any depth below it, in order: by their endings, without hidden files.

    Raises:
        MissingDataError, DataFileError: see `listed` and `files_below`.
    """
    if deep:
        return files_below(folder, IMAGE_EXTENSIONS)
    return [entry.name for entry in listed(folder) if entry.name.lower().endswith(IMAGE_EXTENSIONS)]


class FilePool:
    """Descriptors for reading at offsets, opened when first needed and limited in number.

    Reads name their offset, so descriptors inherited by worker processes are safe to use; they are not pickled.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._open: dict[str, int] = {}

    def read(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes of the file at ``offset``.

        Raises:
            OSError: the file ends before.
        """
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            while len(self._open) >= self.limit:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(path, os.O_RDONLY)
        self._open[path] = descriptor  # most recently used last
        parts, missing = [], size
        while missing:
            part = os.pread(descriptor, missing, offset + size - missing)
            if not part:
                raise OSError(f"{path} ends {missing} bytes early (wanted {size} at {offset}): is the file truncated?")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def __getstate__(self) -> dict[str, int]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["limit"])

    def __del__(self) -> None:
        for descriptor in self._open.values():
            with suppress(OSError):
                os.close(descriptor)
