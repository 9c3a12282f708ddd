"""Reading and writing the files of data sets: whatever is wrong with one is an error that names it and the remedy."""

from __future__ import annotations

import codecs
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from core.data.errors import DataFileError, MissingDataError
from core.errors import VitrineError

if TYPE_CHECKING:
    import numpy as np

_MARKS = (  # UTF-32 before UTF-16, whose mark begins alike
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Endings of files that count as images when a folder is listed, lower case; what a file holds is seen from its bytes.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LARGEST_LABEL = (1 << 31) - 1


@contextmanager
def reading(
    path: str | os.PathLike, remedy: str = "Check its rights, and copy or download it again."
) -> Iterator[None]:
    """Turns what goes wrong while a file or folder is read into an error that names it and what to do.

    Raises:
        MissingDataError: it is not there.
        DataFileError: anything else; errors of this project pass as they are.
    """
    try:
        yield
    except (VitrineError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise MissingDataError(f"there is no {os.fspath(error.filename or path)!r}") from error
    except Exception as error:  # readers of file formats have error types of their own, without a common base
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise DataFileError(f"{os.fspath(path)!r} cannot be read: {reason.splitlines()[0]}. {remedy}") from error


def read_text(path: str | os.PathLike) -> str:
    """The text of a file: UTF-8, or what its byte order mark says (UTF-8, UTF-16, UTF-32); the mark is left out.

    Raises:
        MissingDataError: there is no such file.
        DataFileError: it is in another encoding (the first place is named), or cannot be read.
    """
    with reading(path):
        data = Path(path).read_bytes()
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
            raise DataFileError(
                f"{os.fspath(path)!r} is not {encoding.upper()} text: byte {byte:#04x} in line {line}. Convert it, for "
                "example with `iconv -f latin1 -t utf-8`, or copy it again if it is not a text at all."
            ) from None
        if "\0" in text:
            raise DataFileError(
                f"{os.fspath(path)!r} holds zero bytes: it is not a text, or UTF-16 without a mark. Convert it, for "
                "example with `iconv -f utf-16le -t utf-8`."
            )
    return text


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """Number and text of every line that is not blank, without blanks at its ends.

    Raises:
        MissingDataError, DataFileError: see `read_text`.
    """
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


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


def read_json(path: str | os.PathLike, kind: type = dict, keys: Sequence[str] = (), what: str = "") -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        kind: type of the outermost value.
        keys: that it has to have, when it is a dictionary.
        what: the file should hold, for messages.

    Raises:
        MissingDataError: there is no such file.
        DataFileError: not text, not whole JSON (line and column are named), of another kind, or without a key.
    """
    text = read_text(path)
    remedy = f"Expected is {what}: copy or download it again." if what else "Copy or download it again."
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        end = "it is empty" if not text.strip() else f"it is not whole JSON ({error})"
        raise DataFileError(f"{os.fspath(path)!r} cannot be read: {end}. {remedy}") from None
    if not isinstance(content, kind):
        found = type(content).__name__
        raise DataFileError(f"{os.fspath(path)!r} holds a {found}, not a {kind.__name__}. {remedy}")
    missing = [key for key in keys if key not in content]
    if missing:
        there = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise DataFileError(f"{os.fspath(path)!r} lacks {', '.join(missing)} (it has {there}). {remedy}")
    return content


def read_yaml(path: str | os.PathLike) -> Any:
    """The content of a YAML file.

    Raises:
        MissingDataError: there is no such file.
        DataFileError: not text, or not YAML (line and column are named).
    """
    import yaml

    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DataFileError(f"{os.fspath(path)!r} is not whole YAML ({reason}{place}): mend or copy it") from None


def check_records(
    path: str | os.PathLike,
    name: str,
    records: Any,
    fields: dict[str, type | tuple[type, ...]],
    called: Callable[[dict], str] | None = None,
) -> None:
    """Checks a list of dictionaries in a file: every one has the fields, of the types.

    Args:
        path: the file, for messages.
        name: of the list in the file.
        records: the list.
        fields: name -> type.
        called: what else to call a record in messages.

    Raises:
        DataFileError: names the list, the place in it and the field.
    """
    remedy = "Mend the file, or download it again."
    if not isinstance(records, list):
        raise DataFileError(f"{os.fspath(path)!r}: {name} is a {type(records).__name__}, not a list. {remedy}")
    for place, record in enumerate(records):
        if not isinstance(record, dict):
            what = f"{name}[{place}] is a {type(record).__name__}, not a dictionary"
            raise DataFileError(f"{os.fspath(path)!r}: {what}. {remedy}")
        for field, kind in fields.items():
            if not isinstance(record.get(field), kind):
                found = f"is {record[field]!r:.60}" if field in record else "is missing"
                found += f" ({called(record)})" if called else ""
                raise DataFileError(f"{os.fspath(path)!r}: {field} of {name}[{place}] {found}. {remedy}")


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


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Write to a temporary file that takes the name ``path`` at the end, so that no reader meets half a file.

    When writing fails (a full disk) the temporary file is removed and what was at ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp lets only the owner read; caches are shared in a group.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
