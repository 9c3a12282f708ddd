"""Reads LMDB files, in which LSUN is published, straight from their pages: no library is needed, and no lock taken.

A file is a B+ tree of pages. The newest of two meta pages names the root; branch pages lead to leaf pages, which have
keys in order with their values; a large value lies on pages of its own. Only the main database is read.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from core.config.files import reading
from core.errors import DataFileError

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = 16  # bytes of a page's header on 64-bit machines
_BRANCH, _LEAF, _META = 0x01, 0x02, 0x08
_BIG, _SPECIAL = 0x01, 0x02 | 0x04  # value on other pages; a database inside, or several values of a key
_NO_ROOT = 2**64 - 1


class LMDBError(DataFileError):
    """A file that is damaged or something else; the message names it."""


class LMDBReader:
    """Keys and values of an LMDB environment, read-only.

    Safe to use from several processes and threads: the file is mapped anew after a process has forked or been pickled.

    Args:
        path: the environment's folder, or its `data.mdb`.

    Raises:
        core.data.MissingDataError: no such file.
        LMDBError: it is no LMDB file, was cut off, or was written on another kind of machine.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self.path = path / "data.mdb" if path.is_dir() else path
        self._open()

    def _open(self) -> None:
        with reading(self.path), open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 2 * 4096:
                raise LMDBError(f"{self.path}: {size} bytes are no LMDB file; download or unpack it again")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._page = self._page_size()
        metas = [meta for meta in (self._meta(0), self._meta(self._page)) if meta is not None]
        if not metas:
            raise LMDBError(f"{self.path} is no LMDB file: its first pages lack the mark")
        _, self._count, self._root, last = max(metas)
        if (last + 1) * self._page > size:
            raise LMDBError(
                f"{self.path} was cut off: {size} bytes of {(last + 1) * self._page}; download or unpack it again"
            )

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.path = state["path"]
        self._open()

    def _page_size(self) -> int:
        # The free list's entry in the meta page keeps it.
        size = self._read("<I", _HEADER + 24)[0]
        if size < 512 or size > 65536 or size & (size - 1):
            raise LMDBError(f"{self.path} is no LMDB file of a 64-bit machine (pages of {size} bytes)")
        return size

    def _meta(self, start: int) -> tuple[int, int, int, int] | None:
        """Transaction, entries, root page and last page of a meta page."""
        magic, version = self._read("<II", start + _HEADER)
        if magic != _MAGIC or version != _VERSION or not self._read("<H", start + 10)[0] & _META:
            return None
        # After magic, version, address and size: the free list's and the main database's entries of 48 bytes.
        entries, root = self._read("<QQ", start + _HEADER + 24 + 48 + 32)
        last, transaction = self._read("<QQ", start + _HEADER + 24 + 96)
        return transaction, entries, root, last

    def _read(self, pattern: str, at: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(pattern, self._map, at)
        except struct.error:
            raise LMDBError(f"{self.path} is damaged: byte {at} lies beyond its end") from None

    def __len__(self) -> int:
        return self._count

    def keys(self) -> Iterator[bytes]:
        """All keys in order."""
        for key, _ in self._entries():
            yield key

    def places(self) -> Iterator[tuple[bytes, int, int]]:
        """Every key with place and length of its value in the file, for `value_at`."""
        for key, node in self._entries():
            yield key, *self._value(node, len(key))

    def value_at(self, start: int, length: int) -> bytes:
        """The value of a place given by `places`."""
        return self._map[start : start + length]

    def _entries(self) -> Iterator[tuple[bytes, int]]:
        """Keys and the places of their nodes, from leaf to leaf."""
        pages = [] if self._root == _NO_ROOT else [self._root]
        while pages:
            page = pages.pop() * self._page
            flags, lower = self._read("<HH", page + 10)
            nodes = [page + n for n in self._read(f"<{(lower - _HEADER) // 2}H", page + _HEADER)]
            if flags & _BRANCH:
                children = []
                for node in nodes:
                    low, high, top = self._read("<HHH", node)
                    children.append(low | high << 16 | top << 32)
                pages += reversed(children)
            elif flags & _LEAF:
                for node in nodes:
                    (size,) = self._read("<H", node + 6)
                    yield self._map[node + 8 : node + 8 + size], node
            else:
                raise LMDBError(f"{self.path} is damaged: page {page // self._page} is neither branch nor leaf")

    def _value(self, node: int, key_size: int) -> tuple[int, int]:
        low, high, flags = self._read("<HHH", node)
        if flags & _SPECIAL:
            raise LMDBError(f"{self.path} holds several databases or values of a key, which LSUN's files do not")
        start, length = node + 8 + key_size, low | high << 16
        if flags & _BIG:
            start = self._read("<Q", start)[0] * self._page + _HEADER
        if start + length > len(self._map):
            raise LMDBError(f"{self.path} is damaged: a value ends beyond the file")
        return start, length
