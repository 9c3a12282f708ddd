"""Few-shot recognition with NOAH's lists: Aircraft, Food-101, Flowers, Pets, Cars; 1, 2, 4, 8 or 16 images a class.

    <root>/<task>/annotations/train_meta.list.num_shot_<K>.seed_<S>  val_meta.list  test_meta.list
    <root>/<task>/images/...                    (Cars: cars_train/ and cars_test/ beside annotations/)

Lines are `file class`, split at the last blank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.data import MissingDataError, data_root
from core.errors import ConfigError, nearest
from petl.data.listed import (
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

SPLITS = ("train", "val", "test")
SHOTS = (1, 2, 4, 8, 16)
_LAYOUT = """\
root/<task>/annotations/train_meta.list.num_shot_1.seed_0  val_meta.list  test_meta.list   (lines: file class)
root/<task>/images/...   (cars: root/cars/cars_train/, cars_test/)"""
_PREPARE = "copy the lists of data/few-shot of NOAH's repository, and unpack the images of the data set beside them"


@dataclass(frozen=True)
class Shots:
    """One of the five: number of classes, of validation and of test images, folder of the images, other names."""

    classes: int
    val: int
    test: int
    images: str = "images"
    aliases: tuple[str, ...] = ()


FEW_SHOT_TASKS: dict[str, Shots] = {
    "aircraft": Shots(100, 3333, 3333, aliases=("fgvc-aircraft", "fgvc_aircraft")),
    "food101": Shots(101, 20200, 30300, aliases=("food-101", "food_101")),
    "flowers": Shots(102, 1633, 2463, aliases=("oxford-flowers102", "oxford_flowers", "oxford_flowers102")),
    "pets": Shots(37, 736, 3669, aliases=("oxford-pets", "oxford_pets")),
    # The published folder has the slip of the pen.
    "cars": Shots(196, 1635, 8041, images="", aliases=("standford-cars", "stanford-cars", "stanford_cars")),
}


class FewShot(ListedImages):
    """One of five data sets with few images a class; samples and attributes as those of `ListedImages`.

    Published results are means over the three seeds. The one-shot lists of Pets name every image twice: they are read
    as they are, and `report["repeated"]` says so.

    Args:
        root: folder of all tasks, see the module.
        task: a name in `FEW_SHOT_TASKS`, or an alias.
        split: `train`, `val` or `test`.
        shots: images a class in training.
        seed: of the list, 0 to 2.
        norm: see `petl.data.transforms.statistics`.
        aug: `none`, or in training `rand` or `simple`, see `TransferTransform`.
        size: side of the result.
        interpolation: by which images are resized.
        backbone: for `norm: backbone`.
        flip: probability of a mirrored image.
        sizes: see `petl.data.VTAB1k`.
        transform: in place of what norm, aug, size and interpolation say.

    Raises:
        ConfigError, MissingDataError, DataFileError: see `petl.data.VTAB1k`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        task: str,
        split: str = "train",
        shots: int = 16,
        seed: int = 0,
        norm: str = "imagenet",
        aug: str = "none",
        size: int = 224,
        interpolation: str = "bicubic",
        backbone: str | None = None,
        flip: float = 0.5,
        sizes: str = "check",
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        aliases = {alias: name for name, entry in FEW_SHOT_TASKS.items() for alias in (name, *entry.aliases)}
        if task not in aliases:
            known = ", ".join(FEW_SHOT_TASKS)
            raise ConfigError(f"FewShot has no task '{task}'{nearest(str(task), aliases)} (there are: {known})")
        self.task, self.split = aliases[task], chosen("FewShot", "split", split, SPLITS)
        training = split == "train"
        if aug in ("rand", "simple") and not training:
            raise ConfigError(f"FewShot: aug={aug} on {split}, which is evaluated: set aug: none or centre")
        if shots < 1:
            raise ConfigError(f"FewShot: shots={shots}: at least one image a class ({', '.join(map(str, SHOTS))})")
        if transform is None:
            transform = TransferTransform(size, aug, flip, norm, backbone, interpolation)
        entry = FEW_SHOT_TASKS[self.task]
        what = f"few-shot {self.task}, {shots} shots, seed {seed}, {split}"
        base = data_root(root, what="few-shot data", layout=_LAYOUT, prepare=_PREPARE)
        folder = found_folder(base, (self.task, *entry.aliases), what, _LAYOUT)
        lists = folder / "annotations"
        train_list = lists / f"train_meta.list.num_shot_{shots}.seed_{seed}"
        path = train_list if training else lists / f"{split}_meta.list"
        names, labels = read_list(path, what, entry.classes, "file class")
        repeated = check_repeats(what, names, training, str(path))
        expected = {"train": shots * entry.classes, "val": entry.val, "test": entry.test}[split]
        whole = check_size(what, len(names) - repeated, expected, sizes, str(path))
        trained = labels if training else read_list(train_list, what, entry.classes, "file class")[1]
        report = {"repeated": repeated, "whole": whole}
        report |= examine(what, names, labels, trained, entry.classes, training)
        origin = {"data": "few_shot", "task": self.task, "split": split, "shots": shots, "seed": seed}
        origin |= {"source": "released", "lists": hash_lists(path)}
        super().__init__(folder / entry.images, names, labels, entry.classes, transform, origin, report)
        if not os.path.isfile(self.describe(0)):
            raise MissingDataError(f"{what}: there is no image {self.describe(0)!r}. Expected is\n{_LAYOUT}")
