"""What can be wrong with data on disk, said so that it can be put right."""

import os
from dataclasses import dataclass
from pathlib import Path

from core.errors import DataFileError, MissingDataError, VitrineError


class SampleError(VitrineError, RuntimeError):
    """A sample that cannot be made. The message names the dataset, the index and, where known, the file."""


@dataclass(frozen=True)
class SampleFault:
    """One broken sample that was passed over.

    dataset     class name
    index       of the broken sample
    path        file, where known
    message     what went wrong
    substitute  index of the sample that took its place; None where it was left out
    """

    dataset: str
    index: int
    path: str | None
    message: str
    substitute: int | None = None

    def __str__(self) -> str:
        place = f" ({self.path})" if self.path else ""
        text = f"{self.dataset}[{self.index}]{place}: {self.message}"
        return text if self.substitute is None else f"{text}; replaced by sample {self.substitute}"


def data_root(
    root: str | os.PathLike | None,
    *,
    what: str,
    layout: str,
    key: str = "root",
    prepare: str | None = None,
    kind: str = "folder",
) -> Path:
    """``root`` as a path, or an error that says how to come by it.

    Args:
        root: folder or file as configured; None where the config leaves it open.
        what: the data's name, for the message.
        layout: what is expected there, one line each.
        key: the dataset's argument that sets it.
        prepare: the command that makes it.
        kind: "folder" or "file".

    Raises:
        MissingDataError: naming the config key, the layout and the command.
        DataFileError: a place that may not be looked at.
    """
    path = None if root is None else Path(root).expanduser()
    try:
        if path is not None and (path.is_dir() if kind == "folder" else path.is_file()):
            return path
    except OSError as error:
        raise DataFileError(f"{what}: {str(path)!r} cannot be looked at: {error.strerror}. Check its rights.") from None
    lines = [f"{what}: no {kind} is configured" if path is None else f"{what}: there is no {kind} {str(path)!r}"]
    lines.append(f"  set      train_dataloader.dataset.{key} (val_, test_dataloader alike) to a {kind} laid out as")
    lines += [f"             {line}" for line in layout.strip("\n").splitlines()]
    if prepare:
        lines.append(f"  prepare  {prepare}")
    raise MissingDataError("\n".join(lines))
