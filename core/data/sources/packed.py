"""Many short strings in two arrays, and index files that hold such arrays."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from core.config.files import replacing
from core.data.sources.files import read_arrays


class PackedStrings:
    """A read-only sequence of strings held as one byte array and its offsets.

    A Python list of a million names is a million objects, whose reference counts make every worker process copy the
    pages they lie on; two arrays are shared between processes as they are.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(item) for item in encoded], out=self.offsets[1:])
        self.data = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, data: np.ndarray, offsets: np.ndarray) -> "PackedStrings":
        """From the ``data`` (uint8) and ``offsets`` (int64, one more than strings) of another one."""
        packed = cls.__new__(cls)
        packed.data, packed.offsets = data, offsets
        return packed

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        index %= len(self)
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def save_index(path: str | os.PathLike, strings: Mapping[str, PackedStrings], **arrays: np.ndarray) -> None:
    """Writes an ``.npz`` file that saves a later run from looking through a data set.

    Raises:
        OSError: the file cannot be written.
    """
    parts = {f"{key}_{part}": getattr(value, part) for key, value in strings.items() for part in ("data", "offsets")}
    with replacing(path) as file:
        np.savez(file, **arrays, **parts)


def load_index(path: str | os.PathLike | None, strings: Sequence[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """The strings of these names and all arrays of such a file.

    Raises:
        KeyError: there is no file, or a broken one.
    """
    arrays = (None if path is None else read_arrays(path)) or {}
    unpacked = {key: PackedStrings.from_arrays(arrays[f"{key}_data"], arrays[f"{key}_offsets"]) for key in strings}
    return unpacked, arrays
