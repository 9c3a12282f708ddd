"""PASCAL VOC 2012 for object discovery and semantic segmentation, in the benchmark's layout or the released code's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from core.data import MissingDataError, data_root, load_labels
from slot_walks.data.files import VOID, load_pair, read_lines
from slot_walks.data.transforms import CropTrain, OfficialEval, StandardEval

#: Names of the classes, in the order of their labels.
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_LAYOUT = """\
JPEGImages/<name>.jpg, SegmentationClass/<name>.png, SegmentationObject/<name>.png,
ImageSets/Segmentation/{train,val,trainaug}.txt   (VOC2012, or VOCdevkit above it; trainaug.txt is SBD's list)
or, with class labels only,
images/<name>.jpg, SegmentationClass/<name>.png, SegmentationClassAug/<name>.png, sets/{trainaug,val}.txt"""
_PREPARE = (
    "unpack VOCtrainval_11-May-2012.tar; for trainaug: python tools/prepare_data.py voc_trainaug paper=slot_walks "
    "voc=VOCdevkit/VOC2012 sbd=benchmark_RELEASE/dataset; a stand-in: python tools/prepare_data.py blobworld "
    "paper=slot_walks root=..."
)


@dataclass(frozen=True)
class _Layout:
    """Where things lie below a root."""

    images: str
    lists: str


_LAYOUTS = (_Layout("JPEGImages", "ImageSets/Segmentation"), _Layout("images", "sets"))
# Folders that may lie between the configured root and the pictures.
_INSIDE = ("", "VOCdevkit/VOC2012", "VOC2012", "VOCSegmentation")


class VOC(Dataset):
    """Pictures of VOC 2012; in evaluation with instances and classes.

    Samples: `image` `(3, H, W)` float32; `sample_id`; and with `masks`

    - under the standard protocol `mask`, the instances, `classes`, and `void`, where nobody labelled (bool): all
      `(h, w)`, label 0 is background and 255 void;
    - under the official one `mask`, the classes, in which 255 counts as one more object.

    Args:
        root: folder laid out as described in the error that a missing one gives.
        split: `trainaug`, `train` or `val`.
        transform: of `slot_walks.data.transforms`; None: `CropTrain()`, and for `val` that of the protocol.
        protocol: as above; `standard` evaluates the middle of the scaled picture, `official` that of the picture as
            it is.
        masks: give labels; None: for `val` only.

    Raises:
        MissingDataError: no such folder or list; or no instances, which the standard protocol needs.
        ValueError: unknown split or protocol.
    """

    classes = VOC_CLASSES

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "trainaug",
        transform: Callable[..., Any] | None = None,
        protocol: Literal["standard", "official"] = "standard",
        masks: bool | None = None,
    ) -> None:
        if split not in ("trainaug", "train", "val"):
            raise ValueError(f"VOC has no split {split!r}: use trainaug, train or val")
        if protocol not in ("standard", "official"):
            raise ValueError(f"VOC: protocol={protocol!r}; use standard or official")
        self.root, layout = _find(data_root(root, what="VOC", layout=_LAYOUT, prepare=_PREPARE))
        names = read_lines(self.root / layout.lists / f"{split}.txt", f"VOC ({_PREPARE})")
        self.names = [line.split()[0] for line in names]
        self.images = self.root / layout.images
        self.masks = split == "val" if masks is None else masks
        self.protocol = protocol
        self.class_folder = self.root / ("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
        self.object_folder = self.root / "SegmentationObject"
        if self.masks:
            needed = [self.class_folder] + ([self.object_folder] if protocol == "standard" else [])
            for folder in needed:
                if not folder.is_dir():
                    raise MissingDataError(
                        f"VOC: there is no folder {str(folder)!r}, which protocol={protocol} needs for {split}; "
                        f"expected\n{_LAYOUT}\nprepare  {_PREPARE}"
                    )
        if transform is None:
            evaluated = StandardEval() if protocol == "standard" else OfficialEval()
            transform = evaluated if split == "val" else CropTrain()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.images / f"{self.names[index]}.jpg"

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = {}
        if self.masks:
            folders = {"classes": self.class_folder} | (
                {"mask": self.object_folder} if self.protocol == "standard" else {}
            )
            paths = {kind: folder / f"{self.names[index]}.png" for kind, folder in folders.items()}
            given = {kind: (path, load_labels(path)) for kind, path in paths.items()}
        image, maps = load_pair(self.describe(index), **given)
        if self.masks and self.protocol == "official":
            maps = {"mask": maps["classes"]}
        elif self.masks:
            void = (maps["classes"] == VOID) | (maps["mask"] == VOID)
            maps = {"mask": maps["mask"], "classes": maps["classes"], "void": void.astype(np.int32)}
        image, maps = self.transform(image, maps)
        if "void" in maps:
            maps["void"] = maps["void"].bool()
        return {"image": image, **maps, "sample_id": self.names[index]}


def _find(root: Path) -> tuple[Path, _Layout]:
    """The folder that holds the pictures, and how it is laid out."""
    for inside in _INSIDE:
        for layout in _LAYOUTS:
            if (root / inside / layout.images).is_dir() and (root / inside / layout.lists).is_dir():
                return root / inside, layout
    raise MissingDataError(f"VOC: {str(root)!r} is not laid out as\n{_LAYOUT}\nprepare  {_PREPARE}")
