"""Fine-grained recognition as VPT evaluates it: CUB, NABirds, Oxford Flowers, Stanford Dogs and Stanford Cars.

    <root>/<task>/train.json  val.json  test.json      {"001.Black_footed_Albatross/...jpg": 1, ...}
    <root>/<task>/images/...                           (CUB, NABirds; Dogs: Images/; Flowers and Cars: beside the lists)

The lists of published releases are written by `tools/prepare_data.py paper=petl task=fgvc_lists`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from core.config.files import read_json
from core.data import DataFileError, MissingDataError, data_root
from core.errors import ConfigError, nearest
from petl.data.listed import ListedImages, check_size, chosen, examine, found_folder, hash_lists
from petl.data.transforms import TransferTransform

SPLITS = ("train", "val", "trainval", "test")
_LAYOUT = """\
root/<task>/train.json  test.json  (and val.json)   {"file": class, ...}
root/<task>/images/   (cub, nabirds)   root/<task>/Images/   (dogs)   files beside the lists   (flowers, cars)"""
_PREPARE = "python tools/prepare_data.py paper=petl task=fgvc_lists name=cub root=ROOT/cub"


@dataclass(frozen=True)
class FineGrained:
    """One of the five.

    classes   number of classes
    train     images for training and validation together
    test      images for testing
    val       those of `train` that are for validation by the release itself; 0: none are set apart
    images    folder of the images
    aliases   other names of the task's folder
    """

    classes: int
    train: int
    test: int
    val: int = 0
    images: str = ""
    aliases: tuple[str, ...] = ()


#: In the order of the published tables.
FGVC_TASKS: dict[str, FineGrained] = {
    "cub": FineGrained(200, 5994, 5794, images="images", aliases=("CUB_200_2011", "cub200", "CUB200")),
    "nabirds": FineGrained(555, 23929, 24633, images="images", aliases=("NABirds",)),
    "flowers": FineGrained(102, 2040, 6149, val=1020, aliases=("OxfordFlower", "oxford_flowers102", "Oxford_Flowers")),
    "dogs": FineGrained(120, 12000, 8580, images="Images", aliases=("Stanford_dogs", "stanford_dogs", "StanfordDogs")),
    "cars": FineGrained(196, 8144, 8041, aliases=("Stanford_cars", "stanford_cars", "StanfordCars")),
}


class FGVC(ListedImages):
    """One of five fine-grained data sets; samples and attributes as those of `ListedImages`.

    Classes are numbered by the sorted values that the lists hold. Where there is no `val.json`, a tenth of `train.json`
    is held out, drawn with `seed`.

    Args:
        root: folder of all tasks, see the module.
        task: a name in `FGVC_TASKS`, or an alias.
        split: `train`, `val`, `trainval` (both, as published results are trained) or `test`.
        norm: see `petl.data.transforms.statistics`.
        aug: `simple` in training and `centre` in evaluation are the published protocol; `none` resizes without regard
            to the aspect ratio.
        size: side of the result.
        interpolation: by which images are resized.
        backbone: for `norm: backbone`.
        flip: probability of a mirrored image.
        seed: of what is held out.
        held_out: share of `train.json` that is held out where there is no `val.json`.
        sizes: see `petl.data.VTAB1k`.
        transform: in place of what norm, aug, size and interpolation say.

    Raises:
        ConfigError, MissingDataError, DataFileError: see `petl.data.VTAB1k`; or an image is in two lists.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        task: str,
        split: str = "trainval",
        norm: str = "imagenet",
        aug: str = "none",
        size: int = 224,
        interpolation: str = "bicubic",
        backbone: str | None = None,
        flip: float = 0.5,
        seed: int = 0,
        held_out: float = 0.1,
        sizes: str = "check",
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        aliases = {alias: name for name, entry in FGVC_TASKS.items() for alias in (name, *entry.aliases)}
        if task not in aliases:
            raise ConfigError(
                f"FGVC has no task '{task}'{nearest(str(task), aliases)} (there are: {', '.join(FGVC_TASKS)})"
            )
        self.task, self.split = aliases[task], chosen("FGVC", "split", split, SPLITS)
        if aug in ("rand", "simple") and split in ("val", "test"):
            raise ConfigError(f"FGVC: aug={aug} on {split}, which is evaluated: set aug: centre")
        if not 0 < held_out < 1:
            raise ConfigError(f"FGVC: held_out={held_out}: a share between 0 and 1")
        if transform is None:
            transform = TransferTransform(size, aug, flip, norm, backbone, interpolation)
        what, entry = f"FGVC {self.task}, {split}", FGVC_TASKS[self.task]
        folder = found_folder(
            data_root(root, what="FGVC", layout=_LAYOUT, prepare=_PREPARE), (self.task, *entry.aliases), what, _LAYOUT
        )
        parts, drawn = _parts(folder, what, seed, held_out)
        numbers = _numbers(folder, what, parts, entry.classes, sizes)
        trained = {**parts["train"], **parts["val"]}
        expected = entry.train - (entry.val if drawn else 0)
        whole = check_size(f"FGVC {self.task}, train and val", len(trained), expected, sizes, str(folder))
        whole &= check_size(f"FGVC {self.task}, test", len(parts["test"]), entry.test, sizes, str(folder / "test.json"))
        own = trained if split == "trainval" else parts[split]
        labels = np.array([numbers[value] for value in own.values()], dtype=np.int64)
        base = {"val": parts["train"], "test": trained}.get(split, own)
        known = np.array([numbers[value] for value in base.values()], dtype=np.int64)
        report = {
            "whole": whole,
            **examine(what, list(own), labels, known, entry.classes, split not in ("val", "test")),
        }
        lists = [folder / f"{part}.json" for part in ("train", "val", "test") if not (drawn and part == "val")]
        origin = {"data": "fgvc", "task": self.task, "split": split, "source": "released", "lists": hash_lists(*lists)}
        if drawn:
            origin["held_out"] = {"share": held_out, "seed": seed}
        images = folder / entry.images
        if not images.is_dir():
            raise MissingDataError(f"{what}: there is no folder {str(images)!r} of images. Expected is\n{_LAYOUT}")
        super().__init__(images, own, labels, entry.classes, transform, origin, report)
        if not os.path.isfile(self.describe(0)):
            raise MissingDataError(
                f"{what}: there is no image {self.describe(0)!r}, which the lists name below {str(images)!r}: put "
                "the images of the release there"
            )


def _parts(folder: Path, what: str, seed: int, held_out: float) -> tuple[dict[str, dict[str, Any]], bool]:
    """The lists by split, and whether the validation images were drawn."""
    form = 'a dictionary {"file": class, ...}'
    parts = {}
    for part in ("train", "val", "test"):
        path = folder / f"{part}.json"
        if part == "val" and not path.is_file():
            continue
        parts[part] = read_json(path, what=form)
        odd = [name for name, value in parts[part].items() if not isinstance(value, int | str)]
        if odd or not parts[part]:
            found = f"the class of {odd[0]!r} is {parts[part][odd[0]]!r}" if odd else "it is empty"
            raise DataFileError(f"{what}: {str(path)!r}: {found}. Expected is {form}.")
    drawn = "val" not in parts
    if drawn:
        names = sorted(parts["train"])  # whatever order the file has
        count = max(1, round(held_out * len(names)))
        chosen_names = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
        parts["val"] = {name: value for name, value in parts["train"].items() if name in chosen_names}
        parts["train"] = {name: value for name, value in parts["train"].items() if name not in chosen_names}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := sorted(parts[one].keys() & parts[other].keys()):
            raise DataFileError(
                f"{what}: {len(both)} images are in {one}.json and {other}.json of {str(folder)!r}, first {both[0]!r}: "
                "make the lists anew"
            )
    return parts, drawn


def _numbers(
    folder: Path, what: str, parts: dict[str, dict[str, Any]], classes: int, sizes: str
) -> dict[int | str, int]:
    """Class index of every value in the lists."""
    values = {value for part in parts.values() for value in part.values()}
    if len({type(value) for value in values}) > 1:
        raise DataFileError(f"{what}: the lists in {str(folder)!r} mix numbers and names as classes: make them anew")
    if len(values) > classes or (sizes == "check" and len(values) != classes):
        raise DataFileError(
            f"{what}: expected {classes} classes, found {len(values)} in the lists of {str(folder)!r}. Set sizes: "
            "report (train_dataloader.dataset.sizes, val_, test_dataloader alike) to use fewer"
        )
    return {value: number for number, value in enumerate(sorted(values))}
