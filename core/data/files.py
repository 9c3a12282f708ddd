"""Files that are either whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


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
