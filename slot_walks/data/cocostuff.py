"""COCO-Stuff with its 27 coarse classes (12 of things, 15 of stuff) for unsupervised semantic segmentation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from core.data import MissingDataError, data_root, load_labels
from core.data.sources.files import image_files
from slot_walks.data.files import VOID, load_pair, read_lines
from slot_walks.data.transforms import CropTrain, StandardEval

_LAYOUT = """\
images/{train2017,val2017}/<name>.jpg
annotations/{train2017,val2017}/<name>.png        (stuffthingmaps: labels 0 to 181, 255 is void)
curated/{train2017,val2017}/<list file>           (a name per line)"""
_PREPARE = (
    "unpack train2017.zip, val2017.zip and stuffthingmaps_trainval2017.zip as above, with PiCIE's folder curated; "
    "without lists set list_file to null"
)

# Labels in the files (0 to 181) of each coarse class; 27 classes in the order that the field uses.
_COARSE: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("electronic", tuple(range(71, 77))),
    ("appliance", tuple(range(77, 83))),
    ("food (things)", tuple(range(51, 61))),
    ("furniture (things)", tuple(range(61, 71))),
    ("indoor", tuple(range(83, 91))),
    ("kitchen", tuple(range(43, 51))),
    ("accessory", tuple(range(25, 33))),
    ("animal", tuple(range(15, 25))),
    ("outdoor", tuple(range(9, 15))),
    ("person", (0,)),
    ("sports", tuple(range(33, 43))),
    ("vehicle", tuple(range(1, 9))),
    ("ceiling", (101, 102)),
    ("floor", (100, 113, 114, 115, 116, 117)),
    ("food", (120, 121, 152, 169)),
    ("furniture", (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164)),
    ("raw material", (99, 131, 138, 142)),
    ("textile", (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167)),
    ("wall", tuple(range(170, 177))),
    ("window", (179, 180)),
    ("building", (94, 95, 127, 150, 157, 165)),
    ("ground", (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158)),
    ("plant", (93, 96, 118, 123, 128, 133, 141, 162, 168)),
    ("sky", (105, 156)),
    ("solid", (126, 134, 149, 159, 161, 181)),
    ("structural", (98, 112, 137, 145, 163)),
    ("water", (119, 147, 154, 177, 178)),
)
#: Names of the 27 classes, in the order of their labels.
COCOSTUFF27 = tuple(name for name, _ in _COARSE)
#: The three classes of the small task, in the order of their labels.
COCOSTUFF3 = ("sky", "plant", "ground")


def coarse_labels(num_classes: int = 27) -> np.ndarray:
    """Table from a label in the files to a class: `(256,)` int32, 255 where it belongs to none.

    Raises:
        ValueError: neither 27 nor 3 classes.
    """
    if num_classes not in (27, 3):
        raise ValueError(f"COCO-Stuff has 27 coarse classes, or 3 of them (sky, plant, ground), not {num_classes}")
    table = np.full(256, VOID, np.int32)
    for place, (name, fine) in enumerate(_COARSE):
        if num_classes == 27:
            table[list(fine)] = place
        elif name in COCOSTUFF3:
            table[list(fine)] = COCOSTUFF3.index(name)
    return table


class COCOStuff(Dataset):
    """Pictures with coarse classes.

    Samples: `image` `(3, H, W)` float32; `sample_id`; with `masks` also `mask` `(h, w)` int64, the class, 255
    where there is none.

    Args:
        root: folder laid out as described in the error that a missing one gives.
        split: `train` or `val`.
        transform: of `slot_walks.data.transforms`; None: `CropTrain(crop="center")`, for `val` `StandardEval()`.
        num_classes: 27, or 3 (sky, plant, ground; all else is void).
        list_file: which pictures, a file below `curated/<split>2017/`; None: all that have labels.
        masks: give `mask`; None: for `val` only.

    Raises:
        MissingDataError: no such folder or list, or no pictures.
        ValueError: unknown split, or another number of classes.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        num_classes: int = 27,
        list_file: str | None = "Coco164kFull_Stuff_Coarse_7.txt",
        masks: bool | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"COCO-Stuff has no split {split!r}: use train or val")
        self.table = coarse_labels(num_classes)
        base = data_root(root, what="COCO-Stuff", layout=_LAYOUT, prepare=_PREPARE)
        part = f"{split}2017"
        self.images, self.labels = (
            data_root(base / kind / part, what=f"COCO-Stuff {kind}", layout=_LAYOUT, prepare=_PREPARE)
            for kind in ("images", "annotations")
        )
        if list_file is None:
            self.names = [Path(name).stem for name in image_files(self.labels)]
        else:
            self.names = read_lines(base / "curated" / part / list_file, f"COCO-Stuff ({_PREPARE})")
        if not self.names:
            raise MissingDataError(f"COCO-Stuff: {self.labels} holds no label map; expected\n{_LAYOUT}")
        self.classes = COCOSTUFF27 if num_classes == 27 else COCOSTUFF3
        self.masks = split == "val" if masks is None else masks
        self.transform = transform or (StandardEval() if split == "val" else CropTrain(crop="center"))

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.images / f"{self.names[index]}.jpg"

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = {}
        if self.masks:
            path = self.labels / f"{self.names[index]}.png"
            fine = load_labels(path)
            if fine.min() < 0 or fine.max() > 255:
                raise ValueError(f"{path} has labels from {fine.min()} to {fine.max()}; 0 to 181 and 255 are expected")
            given["mask"] = (path, self.table[fine])
        image, maps = load_pair(self.describe(index), **given)
        image, maps = self.transform(image, maps)
        return {"image": image, **maps, "sample_id": self.names[index]}
