"""A store for what is computed from data once and read often: features, codes, latents, text states.

It knows what it was derived from and refuses to be read as something else. Records are written in shards, each of which
is there as a whole or not at all, so an interrupted job goes on where it was; several ranks may write at once, and of
several jobs the later ones wait for the first and share what it has made. Reading maps the shards into memory and
touches only the records asked for.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.checkpoint.locks import FileLock, Locked
from core.config.files import read_json, replacing
from core.data.loading.sampling import rank_and_world
from core.data.provenance import differences, hash_file, normalised
from core.data.sources.packed import PackedStrings
from core.errors import VitrineError

_FORMAT = 1
_MAX_MAPS = 128


class StaleCacheError(VitrineError, ValueError):
    """The cache was derived from something else than what is asked for."""


class IncompleteCacheError(VitrineError, LookupError):
    """The cache lacks records that are asked for."""


class CorruptCacheError(VitrineError, OSError):
    """The cache's files are not what was written."""


class DerivedCache:
    """Records by sample id, each a dict of arrays: ``cache["0001"] -> {"feature": (N, C)}``.

    Write::

        with DerivedCache(folder, provenance, ids=ids) as cache:
            for chunk in batches(cache.missing(mine=True)):
                cache.write(chunk, {"feature": encoder(images(chunk))})

    Read::

        cache = DerivedCache(folder, provenance, ids=ids)
        cache.require_complete()
        feature = cache[sample_id]["feature"]

    Values may be of any tensor type; their shapes may differ in the first axis (clips of different length).

    Args:
        folder: of this cache alone.
        provenance: everything that decides the values, as numbers, strings, lists and dicts: the hash of the weights,
            the transform's repr, the hash of the file list, a version of the code.
        ids: the samples that a whole cache holds.
        refresh: replace a stale cache by an empty one, in place of refusing it. A fresh one is kept. Processes that
            share the folder must belong to one process group then.
        shard_bytes: size at which a shard is written; what is buffered until then is lost with the process.
        rank, world_size: in place of the process group's.

    Raises:
        StaleCacheError: the folder holds a cache of another provenance; the message lists what differs.
        CorruptCacheError: files are missing or cut short.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        provenance: Mapping[str, Any],
        *,
        ids: Sequence[str] | None = None,
        refresh: bool = False,
        shard_bytes: int = 64 << 20,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.provenance = normalised(provenance)
        self.ids = ids
        self.shard_bytes = shard_bytes
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self._buffer: dict[str, dict[str, Tensor]] = {}
        self._buffered_bytes = 0
        self._kinds: dict[str, list[Any]] | None = None
        self._lock: FileLock | None = None
        self._open_folder(refresh)
        self.reload()

    # ------------------------------------------------------------------ provenance
    def _open_folder(self, refresh: bool) -> None:
        record = self.folder / "provenance.json"
        if not record.is_file():
            used = self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir())
            # Another rank may have made the cache between the two looks.
            if used and not record.is_file():
                raise CorruptCacheError(f"{self.folder} holds files but no provenance.json: it is not a cache")
            if not used:
                self._write_provenance(record)
        stored = _record(record)
        lines = differences(stored, {"format": _FORMAT, "provenance": self.provenance})
        if not lines:
            return
        if not refresh:
            listed = "\n".join(f"  {line.removeprefix('provenance.')}" for line in lines)
            raise StaleCacheError(
                f"{self.folder} was derived from something else:\n{listed}\n"
                "Delete the folder, or open it with refresh=True, to have it computed anew."
            )
        self._replace_stale(record)

    def _replace_stale(self, record: Path) -> None:
        from mmengine.dist import barrier

        # Nobody may still be comparing with the old record, or write beside it, while it is removed.
        barrier()
        if self.rank == 0:
            for path in self.folder.glob("shard-*"):
                path.unlink()
            self._write_provenance(record)
        barrier()

    def _write_provenance(self, record: Path) -> None:
        # Ranks may race here; they write the same bytes.
        text = json.dumps({"format": _FORMAT, "provenance": self.provenance}, indent=1, sort_keys=True)
        with replacing(record) as file:
            file.write(text.encode())

    # ------------------------------------------------------------------ reading
    def reload(self) -> None:
        """See what other processes have written since."""
        shards = [_record(path, "fields") for path in sorted(self.folder.glob("shard-*.json"))]
        for shard in shards:
            for entry in shard["fields"].values():
                path = self.folder / entry["file"]
                size = path.stat().st_size if path.is_file() else None
                if size != entry["bytes"]:
                    found = "is missing" if size is None else f"has {size} bytes in place of {entry['bytes']}"
                    raise CorruptCacheError(f"{path} {found}; delete {path.stem.rpartition('.')[0]}.json to redo it")
        self._shards = [shard["fields"] for shard in shards]
        self._first = np.cumsum([0, *(len(shard["ids"]) for shard in shards)])
        self._index = _IdIndex(identity for shard in shards for identity in shard["ids"])
        self._recent: dict[str, tuple[int, int]] = {}
        self._kinds = {field: entry["kind"] for field, entry in self._shards[0].items()} if shards else self._kinds
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        self._starts: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        """Records on disk and in the buffer."""
        return len(self._index) + len(self._recent) + len(self._buffer)

    def __contains__(self, identity: str) -> bool:
        return identity in self._buffer or self._place(identity) is not None

    def _place(self, identity: str) -> tuple[int, int] | None:
        """Shard and row of a record on disk."""
        if identity in self._recent:
            return self._recent[identity]
        position = self._index.find(identity)
        if position is None:
            return None
        shard = int(np.searchsorted(self._first, position, side="right")) - 1
        return shard, position - int(self._first[shard])

    def __getitem__(self, identity: str) -> dict[str, Tensor]:
        """The record of a sample, in memory of its own.

        Raises:
            IncompleteCacheError: there is none.
        """
        if identity in self._buffer:
            return {field: value.clone() for field, value in self._buffer[identity].items()}
        place = self._place(identity)
        if place is None:
            raise IncompleteCacheError(f"{self.folder} has no record of {identity!r} (it has {len(self)} others)")
        shard, row = place
        return {field: self._read(shard, field, row) for field in self._shards[shard]}

    def _read(self, shard: int, field: str, row: int) -> Tensor:
        entry, key = self._shards[shard][field], (shard, field)
        data = self._maps.pop(key, None)
        if data is None:
            while len(self._maps) >= _MAX_MAPS:
                self._maps.pop(next(iter(self._maps)))
            data = np.load(self.folder / entry["file"], mmap_mode="r", allow_pickle=False)
        self._maps[key] = data  # most recently used last
        if entry["lengths"] is None:
            value = np.array(data[row])
        else:
            if key not in self._starts:
                self._starts[key] = np.cumsum([0, *entry["lengths"]])
            value = np.array(data[self._starts[key][row] : self._starts[key][row + 1]])
        tensor = torch.from_numpy(value)
        return tensor.view(torch.bfloat16) if entry["kind"][0] == "bfloat16" else tensor

    def __getstate__(self) -> dict[str, Any]:
        # A memory map pickles as the whole array; worker processes make their own.
        return {**self.__dict__, "_maps": {}, "_lock": None}

    # ------------------------------------------------------------------ completeness
    def missing(self, ids: Sequence[str] | None = None, mine: bool = False) -> list[str]:
        """Ids without a record, in order.

        Args:
            ids: which to look for; default the cache's ``ids``.
            mine: only this rank's share, which is the same whatever the others have written in the meantime.
        """
        ids = self._expected(ids)
        share = range(self.rank, len(ids), self.world_size) if mine else range(len(ids))
        return [ids[i] for i in share if ids[i] not in self]

    def require_complete(self, ids: Sequence[str] | None = None) -> None:
        """Raises IncompleteCacheError, with the number of missing records, unless all ``ids`` are there."""
        absent = self.missing(ids)
        if absent:
            raise IncompleteCacheError(
                f"{self.folder} lacks {len(absent)} of {len(self._expected(ids))} records, first {absent[0]!r}. "
                "Run the command that fills it again; it goes on with what is missing."
            )

    def _expected(self, ids: Sequence[str] | None) -> Sequence[str]:
        if ids is None and self.ids is None:
            raise ValueError("which samples a whole cache holds is not known: pass ids")
        return self.ids if ids is None else ids

    def verify(self) -> None:
        """Read every shard and hold it against its checksum.

        Raises:
            CorruptCacheError: naming the first file that differs.
        """
        for shard in self._shards:
            for entry in shard.values():
                if hash_file(self.folder / entry["file"]) != entry["hash"]:
                    raise CorruptCacheError(f"{self.folder / entry['file']} is not what was written")

    # ------------------------------------------------------------------ writing
    def write(self, ids: Sequence[str], values: Mapping[str, Tensor | np.ndarray | Sequence[Any]]) -> None:
        """Add one record per id: ``values[field][i]`` belongs to ``ids[i]``.

        Raises:
            ValueError: lengths that differ, an id that is there already, fields, types or shapes (behind the first
                axis) other than those of the first record. Nothing is added then.
            VitrineError: this process writes to the folder under the same rank already. Another one is waited for.
        """
        for field, rows in values.items():
            if not re.fullmatch(r"[\w-]+", field):
                raise ValueError(f"a field's name is part of a file's name: letters, digits, _ and -, not {field!r}")
            if len(rows) != len(ids):
                raise ValueError(f"{len(ids)} ids, but {len(rows)} values of {field!r}")
        if len(set(ids)) < len(ids):
            raise ValueError("an id occurs twice among those to write")
        known = [identity for identity in ids if identity in self]
        if known:
            raise ValueError(f"{self.folder} has a record of {known[0]!r} already; write only cache.missing()")
        # Copies: a row of a batch would keep the whole batch alive, and may change before it is written.
        records = {
            identity: {field: torch.as_tensor(rows[i]).detach().cpu().clone() for field, rows in values.items()}
            for i, identity in enumerate(ids)
        }
        self._check_kinds(records)
        if self._take_lock():  # another process has written meanwhile, perhaps the same ones
            records = {identity: record for identity, record in records.items() if identity not in self}
        self._buffer |= records
        self._buffered_bytes += sum(value.nbytes for record in records.values() for value in record.values())
        if self._buffered_bytes >= self.shard_bytes:
            self.flush()

    def _check_kinds(self, records: Mapping[str, Mapping[str, Tensor]]) -> None:
        expected = self._kinds
        for identity, record in records.items():
            kinds = {field: _kind(value) for field, value in record.items()}
            expected = kinds if expected is None else expected
            if kinds != expected:
                raise ValueError(f"the record of {identity!r} holds {kinds}, where others hold {expected}")
        self._kinds = expected

    def flush(self) -> None:
        """Write what is buffered as a shard."""
        if not self._buffer:
            return
        name = f"shard-r{self.rank:04d}-{self._next_number():06d}"
        records, ids = list(self._buffer.values()), list(self._buffer)
        fields = {field: self._write_field(f"{name}.{field}.npy", field, records) for field in records[0]}
        # The shard exists from here on.
        with replacing(self.folder / f"{name}.json") as file:
            file.write(json.dumps({"ids": ids, "fields": fields}).encode())
        self._recent |= {identity: (len(self._shards), row) for row, identity in enumerate(ids)}
        self._shards.append(fields)
        self._buffer, self._buffered_bytes = {}, 0

    def _write_field(self, name: str, field: str, records: list[dict[str, Tensor]]) -> dict[str, Any]:
        values = [record[field] for record in records]
        ragged = len({value.shape for value in values}) > 1
        data = torch.cat(values) if ragged else torch.stack(values)
        # numpy has no bfloat16; its bits are kept as integers.
        array = (data.view(torch.int16) if data.dtype == torch.bfloat16 else data).numpy()
        path = self.folder / name
        with replacing(path) as file:
            np.save(file, array, allow_pickle=False)
        return {
            "file": name,
            "kind": _kind(values[0]),
            "lengths": [len(value) for value in values] if ragged else None,
            "bytes": path.stat().st_size,
            "hash": hash_file(path),
        }

    def _next_number(self) -> int:
        own = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"shard-r{self.rank:04d}-*.json")]
        return max(own, default=-1) + 1

    def _take_lock(self) -> bool:
        """Be the only writer of this rank, and remove what an interrupted one left of an unfinished shard.

        While another process writes, this one waits, and sees then what that one has written.

        Returns:
            Whether it had to wait.
        """
        if self._lock is not None and self._lock.held:
            return False
        lock = FileLock(self.folder / f".writer-r{self.rank:04d}.lock", f"the cache {self.folder}")
        told: list[str] = []
        try:
            lock.wait(lambda line: (told.append(line), _say(f"{line} is being filled")))
        except Locked:
            raise VitrineError(
                f"this process writes to {self.folder} as rank {self.rank} already; give processes without a common "
                "process group different rank and world_size"
            ) from None
        self._lock = lock
        for pattern in (f"shard-r{self.rank:04d}-*.npy", f".shard-r{self.rank:04d}-*.tmp"):
            for path in self.folder.glob(pattern):
                if not (self.folder / f"{path.name.lstrip('.').split('.')[0]}.json").is_file():
                    path.unlink()
        self.reload()
        return bool(told)

    def __enter__(self) -> "DerivedCache":
        """To fill it: where another process does, its work is waited for, and only what is missing then is left."""
        if self.ids is None or self.missing():
            self._take_lock()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What was computed before an error is as good as what was written before it.
        try:
            self.flush()
        finally:
            if self._lock is not None:
                self._lock.release()


def _record(path: Path, *keys: str) -> dict[str, Any]:
    try:
        return read_json(path, keys=keys)
    except VitrineError as error:
        raise CorruptCacheError(f"{error} Or delete the folder, to have the cache computed anew.") from None


def _say(line: str) -> None:
    from mmengine.logging import print_log

    print_log(line, "current")


def _kind(value: Tensor) -> list[Any]:
    """What all values of a field share: type and shape, in which the first axis is open."""
    return [str(value.dtype).removeprefix("torch."), *(["*", *value.shape[1:]] if value.ndim else [])]


class _IdIndex:
    """Position of an id in a long list, in arrays that worker processes share."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = PackedStrings(ids)
        hashes = np.fromiter((self._hash(identity) for identity in self._ids), np.uint64, len(self._ids))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    @staticmethod
    def _hash(identity: str) -> int:
        return int.from_bytes(blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def find(self, identity: str) -> int | None:
        """Position of ``identity``, None when it is not there."""
        wanted = np.uint64(self._hash(identity))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            if self._ids[int(self._order[place])] == identity:
                return int(self._order[place])
            place += 1
        return None
