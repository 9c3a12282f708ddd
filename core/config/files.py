"""Reading and writing small files: whatever is wrong with one is an error that names it and the remedy."""

from __future__ import annotations

import codecs
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import DataFileError, MissingDataError, VitrineError

_MARKS = (  # UTF-32 before UTF-16, whose mark begins alike
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


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


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Write to a temporary file that takes the name ``path`` at the end, so that no reader meets half a file.

    What is there when the block is left survives a power failure. When writing fails (a full disk) the temporary file
    is removed and what was at ``path`` stays. A file that is replaced hands on its rights.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _rights(path))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _rights(path: Path) -> int:
    """Those of the file that is replaced, else the usual ones: mkstemp lets only the owner read."""
    try:
        return path.stat().st_mode & 0o7777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    """Makes a rename itself durable; file systems that cannot sync a folder do not need it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
