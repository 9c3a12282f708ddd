"""What every data set here is: images by name or number with their classes, held against what is expected of them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.data import DataFileError, MissingDataError, PackedStrings, hash_file, load_image
from core.data.sources.files import read_labels
from core.errors import ConfigError, nearest, some
from petl.data.transforms import TransferTransform

SIZES = ("check", "report")
#: Endings of files that were compressed with loss.
LOSSY = (".jpg", ".jpeg")
Lists = tuple[Sequence[str], np.ndarray]


class ListedImages(Dataset):
    """Images with classes: `{"image", "label", "sample_id"}`; `image` is what the transform makes, `(3, S, S)` float32.

    `num_classes` is the number of classes, `report` what is unusual about the data (see `examine`), and `origin` what a
    result has to say about the data that it was measured on: figures of two origins whose `source` or `norm` differ do
    not belong into one column of a table.

    Args:
        root: folder that the names are relative to.
        names: of the images, in order.
        labels: their classes `(N,)`, from 0.
        num_classes: that there are.
        transform: from a PIL image to a tensor.
        origin: the data set's own part of `origin`.
        report: see `examine`.
    """

    #: Of ImageNet's 1,000, the classes that the images are of; None: all that there are.
    classes: list[int] | None = None

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        labels: np.ndarray,
        num_classes: int,
        transform: Callable[[Any], Tensor],
        origin: Mapping[str, Any],
        report: Mapping[str, Any],
    ) -> None:
        self.root, self.names, self.labels, self.num_classes = root, PackedStrings(names), labels, num_classes
        self.transform, self.report = transform, dict(report)
        self._origin = dict(origin)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, self.transform(self.image(index)))

    def image(self, index: int) -> Image.Image:
        """The image as it is on disk, RGB."""
        return load_image(self.describe(index))

    def sample(self, index: int, image: Tensor) -> dict[str, Any]:
        """The sample that has this tensor for its image."""
        return {"image": image, "label": int(self.labels[index]), "sample_id": self.names[index]}

    def describe(self, index: int) -> str:
        """The file of a sample."""
        return str(self.root / self.names[index])

    def source_files(self) -> list[str]:
        """The files that samples are read from, in their order."""
        return [self.describe(index) for index in range(len(self))]

    @property
    def origin(self) -> dict[str, Any]:
        """What a result says about these data: data set, task, split, source, normalisation, size and the report."""
        transform = self.transform
        known = isinstance(transform, TransferTransform)
        return {
            **self._origin,
            "norm": transform.norm if known else repr(transform),
            **({"mean": list(transform.mean), "std": list(transform.std), "aug": transform.aug} if known else {}),
            "images": len(self),
            **self.report,
        }


def chosen(what: str, key: str, value: str, known: Iterable[str]) -> str:
    """`value`, if it is one of the known words.

    Raises:
        ConfigError: naming the key and the nearest word.
    """
    known = list(known)
    if value not in known:
        raise ConfigError(f"{what}: {key}={value}{nearest(str(value), known)} (there are: {', '.join(known)})")
    return value


def found_folder(root: Path, names: Sequence[str], what: str, layout: str) -> Path:
    """The first of several names of a folder that is there.

    Raises:
        MissingDataError: none is.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise MissingDataError(
        f"{what}: {str(root)!r} has no folder {' or '.join(names)}. Expected is\n{layout}\nSet "
        "train_dataloader.dataset.root (val_, test_dataloader alike) to the folder that holds it."
    )


def read_list(path: Path, what: str, num_classes: int, form: str) -> tuple[list[str], np.ndarray]:
    """Names and classes of a list with one image a line, split at the last blank: names may hold blanks.

    Raises:
        MissingDataError: no such list, none in it, or a line of another form (with its number).
        DataFileError: not text, or a class that does not exist.
    """
    if not path.is_file():
        raise MissingDataError(f"{what}: there is no list {str(path)!r}. It should hold lines of the form `{form}`.")
    names, labels = read_labels(path, None, f"`{form}`", "images")
    if labels.max() >= num_classes:
        first = int(np.argmax(labels >= num_classes))
        raise DataFileError(
            f"{what}: {str(path)!r} gives {names[first]!r} the class {labels[first]}, but classes are 0 to "
            f"{num_classes - 1}: it is the list of another task, or counts classes from 1"
        )
    return names, labels


def check_size(what: str, found: int, expected: int, sizes: str, where: str) -> bool:
    """Whether as many images are listed as there should be.

    Args:
        what: data set, task and split, for messages.
        found: number of images.
        expected: number that there should be.
        sizes: `check`: another number is an error; `report`: it is told.
        where: the file that lists them.

    Raises:
        DataFileError: another number, and `sizes` is `check`.
    """
    chosen(what, "sizes", sizes, SIZES)
    if found == expected:
        return True
    text = f"{what}: expected {expected} images, found {found} in {where!r}"
    if sizes == "check":
        raise DataFileError(
            f"{text}. Finish the download or the preparation, or set sizes: report "
            "(train_dataloader.dataset.sizes, val_, test_dataloader alike) to use a part: its figures are not those of "
            "the published protocol"
        )
    tell(f"{text}: figures are not those of the published protocol")
    return False


def check_repeats(what: str, names: Sequence[str], training: bool, where: str) -> int:
    """How many images of a list are in it again; in evaluation they would count twice.

    Raises:
        DataFileError: an evaluation list with an image twice.
    """
    again = [name for name, count in Counter(names).items() if count > 1]
    if again and not training:
        raise DataFileError(
            f"{what}: {where!r} lists {len(again)} images more than once, first {again[0]!r}: they would count twice. "
            "Remove the repeated lines."
        )
    return len(names) - len(set(names))


def examine(
    what: str, names: Sequence[str], labels: np.ndarray, trained: np.ndarray, num_classes: int, training: bool
) -> dict[str, Any]:
    """What is unusual about a list: told in the log, and returned for a result.

    Args:
        what: data set, task and split, for messages.
        names: of the images.
        labels: their classes.
        trained: classes of the training images that belong to these; the same as `labels` in training.
        num_classes: that there are.
        training: whether this is the training list.

    Returns:
        `lossy`: share of images that are lossy copies (JPEG), in [0, 1]; `untrained_classes`: those without a training
        image; `uncovered`: evaluation images of such a class, which no training on this list can get right.
    """
    covered = np.zeros(num_classes, dtype=bool)
    covered[trained] = True
    untrained = np.flatnonzero(~covered).tolist()
    uncovered = 0 if training else int((~covered[labels]).sum())
    lossy = sum(name.lower().endswith(LOSSY) for name in names) / max(len(names), 1)
    if untrained and training:
        tell(f"{what}: {len(untrained)} of {num_classes} classes have no training image: {some(untrained, 10)}")
    if uncovered:
        tell(
            f"{what}: {uncovered} of {len(labels)} images are of classes without a training image "
            f"({some(untrained, 10)}): at most {1 - uncovered / len(labels):.2%} can be right"
        )
    return {"lossy": round(lossy, 4), "untrained_classes": untrained, "uncovered": uncovered}


def hash_lists(*paths: str | os.PathLike) -> str:
    """Hash of the content of lists, in their order."""
    return "-".join(hash_file(path)[:12] for path in paths)


def tell(line: str) -> None:
    """A line for the log of the run, or the console outside of one."""
    from mmengine.logging import print_log

    print_log(line, "current", logging.WARNING)
