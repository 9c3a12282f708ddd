"""Stanford Dogs and Stanford Cars in the packaging that foreground extraction uses.

Pictures are already scaled; their masks come from a Mask R-CNN, so "truth" here is another network's opinion.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from core.config.files import reading
from core.data import MissingDataError, data_root
from slot_walks.data.files import load_foreground, load_pair
from slot_walks.data.transforms import Square

# Every tenth picture of the training list is held out for validation under the standard protocol.
_HELD_OUT = 10


class _SelectedPictures(Dataset):
    """Pictures whose numbers are in a list; see `Dogs` and `Cars`."""

    lists: dict[str, str]

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        masks: bool | None = None,
        channel_order: Literal["bgr", "rgb"] = "bgr",
        protocol: Literal["official", "standard"] = "official",
        mask_convert: Literal["threshold", "dither"] = "threshold",
    ) -> None:
        name = type(self).__name__
        if split not in ("train", "val", "test"):
            raise ValueError(f"{name} has no split {split!r}: use train, val or test")
        for key, value, known in (
            ("channel_order", channel_order, ("bgr", "rgb")),
            ("protocol", protocol, ("official", "standard")),
            ("mask_convert", mask_convert, ("threshold", "dither")),
        ):
            if value not in known:
                raise ValueError(f"{name}: {key}={value!r}; use {' or '.join(known)}")
        layout = (
            "data_mrcnn/train/resized/<id>_resized.png, <id>_maskresized.png ...\n"
            "data_mrcnn/test/resized/<id>_resized.png, <id>_maskresized.png ...\n"
            f"{self.lists['train']}, {self.lists['test']}   (the ids that are used)"
        )
        base = data_root(
            root, what=name, layout=layout, prepare=f"unpack the {name} archive of the DRC (or BO-QSA) release"
        )
        part = "test" if split == "test" else "train"
        ids = _read_ids(base / self.lists[part], name)
        if protocol == "standard" and part == "train":
            ids = [i for place, i in enumerate(ids) if (place % _HELD_OUT == _HELD_OUT - 1) == (split == "val")]
        self.folder = data_root(base / "data_mrcnn" / part / "resized", what=f"{name} {part} pictures", layout=layout)
        self.ids = ids
        self.transform = Square() if transform is None else transform
        self.masks = split != "train" if masks is None else masks
        self.bgr, self.dither = channel_order == "bgr", mask_convert == "dither"

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / f"{self.ids[index]}_resized.png"

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = {}
        if self.masks:
            path = self.folder / f"{self.ids[index]}_maskresized.png"
            given["mask"] = (path, load_foreground(path, self.dither))
        image, maps = load_pair(self.describe(index), **given)
        if self.bgr:
            image = Image.fromarray(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
        image, maps = self.transform(image, maps)
        return {"image": image, **maps, "sample_id": self.ids[index]}


class Dogs(_SelectedPictures):
    """Dogs with their foreground.

    Samples: `image` `(3, size, size)` float32; `mask` `(size, size)` int64, 1 on the dog (`masks`); `sample_id`.

    Args:
        root: folder laid out as described in the error that a missing one gives.
        split: `train`, `val` or `test`.
        transform: of `slot_walks.data.transforms`; None: `Square()`.
        masks: give `mask`; None: not in training.
        channel_order: `bgr`, as the released code hands pictures to the backbone, or `rgb`.
        protocol: `official`: `val` is the training list itself; `standard`: `val` is every tenth picture of it, which
            `train` then lacks.
        mask_convert: see `Birds`.

    Raises:
        MissingDataError: no such folder or list.
        ValueError: unknown split or option.
    """

    lists = {"train": "data_tr_sel.npy", "test": "data_te_sel.npy"}  # noqa: RUF012


class Cars(_SelectedPictures):
    """Cars with their foreground; samples and arguments as those of `Dogs`."""

    lists = {"train": "data_mrcnn_train_select.npy", "test": "data_mrcnn_test_select.npy"}  # noqa: RUF012


def _read_ids(path: Path, name: str) -> list[str]:
    if not path.is_file():
        raise MissingDataError(f"{name}: there is no list {str(path)!r}, which names the pictures that are used")
    with reading(path, "It should be a numpy array of ids: copy or download it again."):
        ids = np.load(path, allow_pickle=False)
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iuUS":
            raise ValueError(f"it holds {getattr(ids, 'dtype', 'several arrays')} of shape {getattr(ids, 'shape', ())}")
        return [i.decode() if isinstance(i, bytes) else str(i) for i in ids.tolist()]
