"""Oxford Flowers 102 with its segmentations, as foreground extraction splits it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from core.config.files import reading
from core.data import DataFileError, data_root, load_image
from slot_walks.data.files import load_mat, load_pair
from slot_walks.data.transforms import Square

_LAYOUT = """\
jpg/image_00001.jpg ...   segmim/segmim_00001.jpg ...   setid.mat"""
_PREPARE = "unpack 102flowers.tgz and 102segmentations.tgz into one folder, with setid.mat beside them"
# The largest part is for training, other than the data set's own names say.
_SPLITS = {"train": "tstid", "val": "valid", "test": "trnid"}
_BLUE = np.array([0, 0, 254])


class Flowers(Dataset):
    """Flowers with their foreground.

    Samples: `image` `(3, size, size)` float32; `mask` `(size, size)` int64, 1 on the flower (`masks`); `sample_id`.
    The segmentations are JPEG pictures whose background is blue, so their borders are noisy.

    Args:
        root: folder laid out as described in the error that a missing one gives.
        split: `train` (6,149 pictures, `tstid`), `val` (1,020, `valid`) or `test` (1,020, `trnid`).
        transform: of `slot_walks.data.transforms`; None: `Square()`.
        masks: give `mask`; None: not in training.
        flowers_mask: `exact`, as released: background is where red is 0, green is 0 or blue is 254; `tolerant`:
            where the colour is within `tolerance` of the blue.
        tolerance: largest difference from the blue in any channel.

    Raises:
        MissingDataError: no such folder or list.
        ValueError: unknown split or mask rule, or a list without the split.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        masks: bool | None = None,
        flowers_mask: Literal["exact", "tolerant"] = "exact",
        tolerance: int = 40,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"Flowers has no split {split!r}: use {', '.join(_SPLITS)}")
        if flowers_mask not in ("exact", "tolerant"):
            raise ValueError(f"Flowers: flowers_mask={flowers_mask!r}; use exact or tolerant")
        self.root = data_root(root, what="Flowers", layout=_LAYOUT, prepare=_PREPARE)
        self.numbers = _read_split(self.root / "setid.mat", _SPLITS[split])
        self.transform = Square() if transform is None else transform
        self.masks = split != "train" if masks is None else masks
        self.flowers_mask, self.tolerance = flowers_mask, tolerance

    def __len__(self) -> int:
        return len(self.numbers)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.root / "jpg" / f"image_{self.numbers[index]:05d}.jpg"

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, given = self.describe(index), {}
        if self.masks:
            segmented = self.root / "segmim" / f"segmim_{self.numbers[index]:05d}.jpg"
            given["mask"] = (segmented, self._foreground(np.array(load_image(segmented))))
        image, maps = load_pair(path, **given)
        image, maps = self.transform(image, maps)
        return {"image": image, **maps, "sample_id": path.stem}

    def _foreground(self, pixels: np.ndarray) -> np.ndarray:
        """`(H, W, 3)` uint8 to `(H, W)` int32, 0 or 1."""
        if self.flowers_mask == "exact":
            background = (pixels == _BLUE).any(axis=-1)
        else:
            background = (np.abs(pixels.astype(np.int32) - _BLUE) <= self.tolerance).all(axis=-1)
        return (~background).astype(np.int32)


def _read_split(path: Path, key: str) -> list[int]:
    lists = load_mat(path, "Flowers")
    if key not in lists or not lists[key].size:
        raise DataFileError(f"{path} has no list '{key}': download it again")
    with reading(path):
        return [int(number) for number in np.ravel(lists[key])]
