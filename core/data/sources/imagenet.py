"""ImageNet-1k from folders, a zip archive or tar shards: one dataset, three ways to store it."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch.utils.data import Dataset

from core.data.errors import data_root
from core.data.sources.folder import ImageFolder
from core.data.sources.image_zip import ImageZip
from core.data.sources.images import to_uint8
from core.data.sources.tar import TarShards
from core.errors import MissingDataError

_LAYOUTS = {
    "folder": "root/train/<wnid>/*.JPEG   1000 folders, 1 281 167 images\nroot/val/<wnid>/*.JPEG     50 000 images",
    "zip": "root/train.zip  root/train_map.txt\nroot/val.zip    root/val_map.txt",
    "shards": "root/{split}-*.tar   webdataset shards whose samples have a jpg (or jpeg, png) and a cls",
}
_PREPARE = {
    "folder": "python tools/prepare_data.py imagenet output=ROOT train=ILSVRC2012_img_train.tar "
    "val=ILSVRC2012_img_val.tar devkit=ILSVRC2012_devkit_t12.tar.gz",
    "zip": "python tools/prepare_data.py image_zip root=FOLDERS output=ROOT",
    "shards": "python tools/prepare_data.py image_shards root=FOLDERS output=ROOT split=train (then split=val)",
}


class ImageNet(Dataset):
    """``{"image", "label", "sample_id"}`` of ImageNet, or of any set stored the same way.

    Args:
        root: see ``storage``.
        split: "train" or "val".
        transform: from a PIL RGB image to a tensor; uint8 (3, H, W) without one.
        storage: ``folder``: ``root/<split>/<wnid>/*.JPEG``, class index by sorted wnid; ``zip``: ``root/<split>.zip``
            with ``root/<split>_map.txt``; ``shards``: tar files.
        num_classes: held against what is found (folders) or read (labels); None for no check.
        shards: pattern of the shards below root; default ``<split>-*.tar``.
        index_folder: where the file list or the shards' offsets are kept between runs. By default offsets lie beside
            their shards, and file lists are not kept.

    Raises:
        MissingDataError: nothing at root, or another number of classes.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        storage: Literal["folder", "zip", "shards"] = "folder",
        num_classes: int | None = 1000,
        shards: str | Sequence[str] | None = None,
        index_folder: str | os.PathLike | None = None,
    ) -> None:
        if storage not in _LAYOUTS:
            raise ValueError(f"storage must be one of {', '.join(_LAYOUTS)}, not {storage!r}")
        prepare = _PREPARE[storage]
        root = data_root(root, what=f"ImageNet ({storage})", layout=_LAYOUTS[storage], prepare=prepare)
        self.split, self.storage, self.transform = split, storage, transform
        self.num_classes = num_classes
        self.source: ImageFolder | ImageZip | TarShards
        if storage == "folder":
            index_file = None if index_folder is None else os.path.join(index_folder, f"imagenet_{split}.npz")
            self.source = ImageFolder(root, split, transform, index_file=index_file, prepare=prepare)
            found = len(self.source.classes)
        elif storage == "zip":
            self.source = ImageZip(root, split, transform, prepare=prepare)
            found = int(self.source.labels.max()) + 1
        else:
            self.source = TarShards(
                shards or f"{split}-*.tar",
                root=root,
                fields={"image": "jpg;jpeg;png", "label": "cls"},
                transforms={"image": transform or to_uint8},
                index_folder=index_folder or "beside",
            )
            found = num_classes
        if num_classes is not None and found != num_classes:
            raise MissingDataError(
                f"{root} ({split}) has {found} classes, expected {num_classes}; for a subset set num_classes: {found}"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.source[index]
        if self.num_classes is not None and not 0 <= sample["label"] < self.num_classes:
            raise ValueError(f"{self.describe(index)}: label {sample['label']} is outside {self.num_classes} classes")
        return sample

    def describe(self, index: int) -> str:
        """Where a sample lies."""
        return self.source.describe(index)

    def source_files(self) -> list[str]:
        """The files that samples are read from: images, an archive and its list, or shards."""
        return self.source.source_files()
