"""VTAB-1k: nineteen tasks of a thousand training images each, in the layout that NOAH gave them.

    vtab-1k/<task>/images/<split>/000000.jpg ...
    vtab-1k/<task>/train800.txt  val200.txt  train800val200.txt  test.txt      lines "images/<split>/000000.jpg 3"

The lists choose what is read. For data without files of their own (arrays, or the data set as it was published) a line
is `<index> <class>`, the index counting from 0: of the rows of `<task>/images.npy` (uint8 `(N, H, W)` or
`(N, H, W, 3)`, which `tools/prepare_data.py paper=petl task=vtab_tensors` writes), or of the images of the published
data set in the order that `petl.data.originals` gives them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from core.config.files import reading
from core.data import DataFileError, MissingDataError, data_root, to_pil
from core.errors import ConfigError, nearest
from petl.data.listed import (
    LOSSY,
    ListedImages,
    check_repeats,
    check_size,
    chosen,
    examine,
    found_folder,
    hash_lists,
    read_list,
)
from petl.data.transforms import TransferTransform

if TYPE_CHECKING:
    from petl.data.originals import Original

SPLITS = {"train800": 800, "val200": 200, "train800val200": 1000, "test": None}
#: Which images a split's model was trained on: what `val200` and `test` are held against.
_TRAINED_ON = {"val200": "train800", "test": "train800val200"}
SOURCES = ("noah_jpeg", "png", "tensors", "originals")
_LAYOUT = """\
root/<task>/images/<split>/000000.jpg ...
root/<task>/train800.txt  val200.txt  train800val200.txt  test.txt   (lines: images/<split>/000000.jpg 3)"""
_PREPARE = (
    "the archive vtab-1k of NOAH (source: noah_jpeg), or lossless copies from the published data sets by "
    "python tools/prepare_data.py paper=petl task=vtab_png name=TASK originals=FOLDER lists=FOLDER output=ROOT "
    "(source: png)"
)


@dataclass(frozen=True)
class Task:
    """A task of VTAB-1k.

    classes   number of classes
    test      number of test images
    group     `natural`, `specialised` or `structured`
    aliases   other names of its folder
    flip      whether a mirrored image keeps its class
    moves     whether a turned or shifted image keeps its class, so that RandAugment may be used
    """

    classes: int
    test: int
    group: str
    aliases: tuple[str, ...] = ()
    flip: bool = True
    moves: bool = True


#: In the order of the published tables.
TASKS: dict[str, Task] = {
    "cifar": Task(100, 10000, "natural", ("cifar100", "cifar-100")),
    "caltech101": Task(102, 6084, "natural", ("caltech", "caltech-101")),
    "dtd": Task(47, 1880, "natural"),
    "oxford_flowers102": Task(102, 6149, "natural", ("flowers", "flowers102", "oxford_flowers")),
    "oxford_iiit_pet": Task(37, 3669, "natural", ("oxford_pet", "pets", "oxford_pets")),
    "svhn": Task(10, 26032, "natural"),
    "sun397": Task(397, 21750, "natural", ("sun",)),
    "patch_camelyon": Task(2, 32768, "specialised", ("camelyon",)),
    "eurosat": Task(10, 5400, "specialised"),
    "resisc45": Task(45, 6300, "specialised", ("resisc",)),
    "diabetic_retinopathy": Task(5, 42670, "specialised", ("retinopathy",)),
    "clevr_count": Task(8, 15000, "structured"),
    "clevr_dist": Task(6, 15000, "structured"),
    "dmlab": Task(6, 22735, "structured"),
    # A mirrored road is a country with traffic on the other side: the distances stay, the images do not occur.
    "kitti": Task(4, 711, "structured", flip=False),
    "dsprites_loc": Task(16, 73728, "structured", flip=False, moves=False),
    "dsprites_ori": Task(16, 73728, "structured", flip=False, moves=False),
    "smallnorb_azi": Task(18, 12150, "structured", flip=False, moves=False),
    "smallnorb_ele": Task(9, 12150, "structured", flip=False, moves=False),
}
GROUPS = {
    group: tuple(name for name, task in TASKS.items() if task.group == group)
    for group in ("natural", "specialised", "structured")
}


def task_named(name: str) -> str:
    """The name in `TASKS` of a task that may be called by one of its aliases.

    Raises:
        ConfigError: no such task.
    """
    aliases = {alias: task for task, entry in TASKS.items() for alias in (task, *entry.aliases)}
    if name not in aliases:
        raise ConfigError(f"VTAB-1k has no task '{name}'{nearest(str(name), aliases)} (there are: {', '.join(TASKS)})")
    return aliases[name]


class VTAB1k(ListedImages):
    """A task of VTAB-1k; samples and attributes as those of `ListedImages`.

    Args:
        root: folder of all tasks, see the module.
        task: a name in `TASKS`, or an alias (`cifar100`).
        split: `train800`, `val200`, `train800val200` or `test`. Hyper-parameters are chosen with the first two, results
            come from the last two.
        norm: `imagenet`, `inception` or `backbone`, see `petl.data.transforms.statistics`.
        source: what the images are: `noah_jpeg`, the lossy copies of NOAH's archive, which published tables rest on;
            `png`, lossless ones; `tensors`, rows of an array; `originals`, the published data set itself. CIFAR-100
            differs by some ten points between the first and the others, so results name it.
        aug: `none`, or `rand` in training, see `TransferTransform`.
        size: side of the result.
        interpolation: by which images are resized.
        backbone: for `norm: backbone`.
        flip: probability of a mirrored image with `aug: rand`; None: 0.5 where the task allows it.
        sizes: `check`: another number of images than the published is an error; `report`: it is told in the log.
        originals: folder of the published data set, for `source: originals`.
        transform: in place of what norm, aug, size and interpolation say.

    Raises:
        ConfigError: an unknown word, or an augmentation that changes what the task asks for.
        MissingDataError: no folder, list or image.
        DataFileError: a broken list, a class that does not exist, another number of images than expected, or images of
            another source than configured.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        task: str,
        split: str = "train800val200",
        norm: str = "imagenet",
        source: str = "noah_jpeg",
        aug: str = "none",
        size: int = 224,
        interpolation: str = "bicubic",
        backbone: str | None = None,
        flip: float | None = None,
        sizes: str = "check",
        originals: str | os.PathLike[str] | None = None,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.task = task_named(task)
        self.split, self.source = chosen("VTAB1k", "split", split, SPLITS), chosen("VTAB1k", "source", source, SOURCES)
        what, entry = f"VTAB-1k {self.task}, {split}", TASKS[self.task]
        if transform is None:
            flip = self._check_augmentation(aug, flip)
            transform = TransferTransform(size, aug, flip, norm, backbone, interpolation)
        base = data_root(root, what="VTAB-1k", layout=_LAYOUT, prepare=_PREPARE)
        folder = found_folder(base, (self.task, *entry.aliases), what, _LAYOUT)
        training = split not in _TRAINED_ON
        form = "images/<split>/000000.jpg 3" if source in ("noah_jpeg", "png") else "<index> <class>"
        path = folder / f"{split}.txt"
        names, labels = read_list(path, what, entry.classes, form)
        whole = check_size(what, len(names), SPLITS[split] or entry.test, sizes, str(path))
        report = {"repeated": check_repeats(what, names, training, str(path)), "whole": whole}
        trained = labels
        if not training:
            other = folder / f"{_TRAINED_ON[split]}.txt"
            trained = read_list(other, what, entry.classes, form)[1]
        report |= examine(what, names, labels, trained, entry.classes, training)
        origin = {"data": "vtab1k", "task": self.task, "split": split, "source": source, "lists": hash_lists(path)}
        super().__init__(folder, names, labels, entry.classes, transform, origin, report)
        self._array: np.ndarray | None = None
        self._original: Original | None = None
        if source in ("noah_jpeg", "png"):
            self._check_files(what)
        else:
            self._indices = self._read_indices(what, path)
            self._open(what, path, originals)

    def _check_augmentation(self, aug: str, flip: float | None) -> float:
        entry = TASKS[self.task]
        if aug not in ("none", "centre") and self.split in _TRAINED_ON:
            raise ConfigError(f"VTAB1k: aug={aug} on {self.split}, which is evaluated: set aug: none")
        if aug in ("rand", "simple") and not entry.moves:
            raise ConfigError(
                f"VTAB1k: aug={aug} turns and shifts images, and {self.task} asks for position or orientation: "
                "set aug: none"
            )
        if flip and not entry.flip:
            raise ConfigError(f"VTAB1k: flip={flip}, but mirrored images of {self.task} are wrong: set flip: null")
        return (0.5 if entry.flip else 0.0) if flip is None else flip

    # ------------------------------------------------------------------ copies, one file an image
    def _check_files(self, what: str) -> None:
        wanted = LOSSY if self.source == "noah_jpeg" else (".png",)
        odd = [name for name in self.names if not name.lower().endswith(wanted)]
        if odd:
            raise DataFileError(
                f"{what}: source={self.source} means files that end with {' or '.join(wanted)}, but {len(odd)} of "
                f"{len(self)} do not, first {odd[0]!r}: set train_dataloader.dataset.source (val_, test_dataloader "
                f"alike) to what they are ({', '.join(SOURCES)}). Results of lossy and lossless copies do not compare"
            )
        for index in (0, len(self) - 1):  # a missing folder shows at once; single files when they are read
            if not os.path.isfile(self.describe(index)):
                raise MissingDataError(
                    f"{what}: there is no image {self.describe(index)!r}, which {self.split}.txt lists. "
                    f"Unpack the archive again, or make it: {_PREPARE}"
                )

    # ------------------------------------------------------------------ rows of an array, images of a published set
    def _read_indices(self, what: str, path: Path) -> np.ndarray:
        odd = [name for name in self.names if not (name.isascii() and name.isdecimal() and len(name) < 10)]
        if odd:
            raise DataFileError(
                f"{what}: source={self.source} needs lines `<index> <class>`, but {str(path)!r} lists {odd[0]!r}: set "
                "source to noah_jpeg or png for lists of files"
            )
        return np.array([int(name) for name in self.names])

    def _open(self, what: str, path: Path, originals: str | os.PathLike[str] | None) -> None:
        if self.source == "tensors":
            self._array = _read_array(self.root, what)
            count = len(self._array)
        else:
            from petl.data.originals import open_original

            self._original = open_original(self.task, originals)
            count = len(self._original)
        if self._indices.max() >= count:
            raise DataFileError(
                f"{what}: {str(path)!r} asks for image {self._indices.max()}, but there are {count} (0 to {count - 1})"
            )
        if self._original is not None:
            self._original.check_labels(self._indices, self.labels, str(path))

    def image(self, index: int) -> Image.Image:
        """The image as it is on disk, RGB."""
        if self._original is not None:
            return self._original.image(int(self._indices[index]))
        if self.source == "tensors":
            if self._array is None:  # in a process that this data set was sent to
                self._array = _read_array(self.root, f"VTAB-1k {self.task}")
            return to_pil(np.array(self._array[self._indices[index]]))
        return super().image(index)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map pickles as the whole array.
        return {**self.__dict__, "_array": None}

    def describe(self, index: int) -> str:
        """The file of a sample, or its place in one."""
        if self.source in ("noah_jpeg", "png"):
            return super().describe(index)
        return f"image {self.names[index]} of {self.source_files()[0]}"

    def source_files(self) -> list[str]:
        """The files that samples are read from."""
        if self._original is not None:
            return self._original.source_files()
        if self.source == "tensors":
            return [str(self.root / "images.npy")]
        return super().source_files()


def _read_array(folder: Path, what: str) -> np.ndarray:
    """The images of a task as one array, mapped into memory."""
    path = folder / "images.npy"
    if not path.is_file():
        raise MissingDataError(
            f"{what}: source=tensors needs {str(path)!r}, uint8 of shape (N, H, W) or (N, H, W, 3): "
            "`tools/prepare_data.py paper=petl task=vtab_tensors` writes it, and so does numpy.save"
        )
    with reading(path, "It should be an array of images that numpy.save has written: make or copy it again."):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3):
        raise DataFileError(
            f"{what}: {str(path)!r} holds {array.dtype} of shape {array.shape}, expected is uint8 of (N, H, W) or "
            "(N, H, W, 3)"
        )
    return array
