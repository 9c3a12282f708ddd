"""CUB-200-2011 in the packaging that foreground extraction uses (with masks and a three-way split)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from core.config.files import reading
from core.data import DataFileError, MissingDataError, data_root
from slot_walks.data.files import load_foreground, load_pair, read_table
from slot_walks.data.transforms import Square, bird_window

_LAYOUT = """\
images/<class>/<name>.jpg ...   segmentations/<class>/<name>.png ...
images.txt                      number, path below images/
bounding_boxes.txt              number, x, y, width, height
train_val_test_split.txt        number, 0 (train), 1 (val) or 2 (test)"""
_PREPARE = (
    "unpack CUB_200_2011 with its segmentations into one folder and add train_val_test_split.txt of the "
    "DRC release (10,000 / 1,000 / 788 pictures); a stand-in: python tools/prepare_data.py blobworld_fe "
    "paper=slot_walks root=..."
)
_SPLITS = {"train": "0", "val": "1", "test": "2"}


class Birds(Dataset):
    """Birds, cut out around their boxes, with their foreground.

    Samples: `image` `(3, size, size)` float32; `mask` `(size, size)` int64, 1 on the bird (`masks`); `sample_id`,
    the path below `images/` without suffix.

    Args:
        root: folder laid out as described in the error that a missing one gives.
        split: `train`, `val` or `test`.
        transform: of `slot_walks.data.transforms`; None: `Square()`.
        masks: give `mask`; None: not in training, which reads nothing of them.
        mask_convert: what becomes of grey masks (several annotators): `threshold` at the middle, or `dither`, as
            released.

    Raises:
        MissingDataError: no such folder or list, or nothing in the split.
        ValueError: unknown split or conversion, lists that do not fit each other.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        masks: bool | None = None,
        mask_convert: Literal["threshold", "dither"] = "threshold",
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"Birds has no split {split!r}: use {', '.join(_SPLITS)}")
        if mask_convert not in ("threshold", "dither"):
            raise ValueError(f"Birds: mask_convert={mask_convert!r}; use threshold or dither")
        self.root = data_root(root, what="Birds", layout=_LAYOUT, prepare=_PREPARE)
        names = read_table(self.root / "images.txt", 1, "Birds")
        boxes = read_table(self.root / "bounding_boxes.txt", 4, "Birds")
        splits = read_table(self.root / "train_val_test_split.txt", 1, "Birds")
        odd = [number for number in names if number not in boxes or number not in splits]
        if odd:
            raise DataFileError(
                f"{self.root}: picture {odd[0]} of images.txt is not in bounding_boxes.txt and "
                f"train_val_test_split.txt (nor are {len(odd) - 1} others): the lists are not of one release"
            )
        chosen = [number for number in names if splits[number][0] == _SPLITS[split]]
        if not chosen:
            raise MissingDataError(
                f"{self.root / 'train_val_test_split.txt'} has no {split} picture ({_SPLITS[split]})"
            )
        self.names = [names[number][0].rsplit(".", 1)[0] for number in chosen]
        # The released code drops fractions of pixels.
        with reading(self.root / "bounding_boxes.txt", "Every line should hold a number and a box of four."):
            self.boxes = [[int(float(v)) for v in boxes[number]] for number in chosen]
        self.files = [self.root / "images" / names[number][0] for number in chosen]
        self.transform = Square() if transform is None else transform
        self.masks = split != "train" if masks is None else masks
        self.dither = mask_convert == "dither"

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.files[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = {}
        if self.masks:
            path = self.root / "segmentations" / f"{self.names[index]}.png"
            given["mask"] = (path, load_foreground(path, self.dither))
        image, maps = load_pair(self.files[index], **given)
        image, maps = bird_window(self.boxes[index], image.size).cut(image, maps)
        image, maps = self.transform(image, maps)
        return {"image": image, **maps, "sample_id": self.names[index]}
