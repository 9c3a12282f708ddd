"""COCO 2017's instances for object discovery."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mmengine.logging import print_log
from PIL import Image
from torch.utils.data import Dataset

from core.data import DataFileError, MissingDataError, data_root, load_image
from core.data.sources.annotations import decode, read_annotations
from slot_walks.data.transforms import CropTrain, OfficialEval, StandardEval

_LAYOUT = """\
annotations/instances_train2017.json, instances_val2017.json
train2017/*.jpg, val2017/*.jpg"""
_PREPARE = "unpack train2017.zip, val2017.zip and annotations_trainval2017.zip of cocodataset.org into one folder"


class COCO(Dataset):
    """Pictures of COCO 2017; in evaluation with instances and categories.

    Samples: `image` `(3, H, W)` float32; `sample_id`; and with `masks`

    - under the standard protocol `mask`, instances from 1 on, `classes`, categories from 1 on in the order of the
      file, and `void` (bool), pixels of crowds and of several instances: all `(h, w)`, 0 is background;
    - under the official one `mask`, the sum over annotations of their number times their pixels, from 0 on: the first
      one becomes background, and overlapping ones make labels of their own.

    Args:
        root: folder laid out as described in the error that a missing one gives.
        split: `train` or `val`.
        transform: of `slot_walks.data.transforms`; None: `CropTrain(crop="center")`, and for `val` that of the
            protocol.
        protocol: as above.
        masks: give labels; None: for `val` only.

    Raises:
        MissingDataError: no such folder or file, or no picture or mask in it.
        ValueError: unknown split or protocol.
        DataFileError: an annotation file that cannot be read, see `core.data.sources.annotations.read_annotations`.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        protocol: Literal["standard", "official"] = "standard",
        masks: bool | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"COCO has no split {split!r}: use train or val")
        if protocol not in ("standard", "official"):
            raise ValueError(f"COCO: protocol={protocol!r}; use standard or official")
        base = data_root(root, what="COCO", layout=_LAYOUT, prepare=_PREPARE)
        path = base / "annotations" / f"instances_{split}2017.json"
        if not path.is_file():
            raise MissingDataError(f"COCO: there is no file {str(path)!r}; expected\n{_LAYOUT}\nprepare  {_PREPARE}")
        self.folder = data_root(base / f"{split}2017", what="COCO pictures", layout=_LAYOUT, prepare=_PREPARE)
        self.masks = split == "val" if masks is None else masks
        self.path, content = path, read_annotations(path, "masks" if self.masks else "images")
        if not content["images"]:
            raise MissingDataError(f"COCO: {str(path)!r} lists no image: copy or download it again")
        self.files = [entry["file_name"] for entry in content["images"]]
        sizes = [(entry.get("width"), entry.get("height")) for entry in content["images"]]
        self.sizes = [None if None in size else size for size in sizes]
        self.protocol = protocol
        self.annotations: list[list[dict[str, Any]]] = []
        if self.masks:
            self.categories = {entry["id"]: place for place, entry in enumerate(content["categories"], start=1)}
            by_picture = defaultdict(list)
            whole = [entry for entry in content["annotations"] if _has_mask(entry)]
            if not whole:
                raise MissingDataError(f"COCO: {str(path)!r} has no annotation with a mask, which masks=true asks for")
            if skipped := len(content["annotations"]) - len(whole):
                text = f"{path}: of {len(content['annotations'])} annotations are skipped: {skipped} without a mask"
                print_log(
                    f"{text} (no polygon of three points or more, or a box of no area)", "current", logging.WARNING
                )
            for annotation in whole:
                by_picture[annotation["image_id"]].append(annotation)
            self.annotations = [by_picture[entry["id"]] for entry in content["images"]]
        if transform is None:
            evaluated = StandardEval() if protocol == "standard" else OfficialEval()
            transform = evaluated if split == "val" else CropTrain(crop="center")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / self.files[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        size, file = self.sizes[index], self.describe(index)
        image, maps = load_image(file, size=size), {}
        if self.masks:
            if size is not None and image.size != size:
                raise DataFileError(
                    f"{str(file)!r} is {image.width} x {image.height}, in the annotation file {size[0]} x {size[1]}: "
                    "its masks belong to another size of the picture. Mend width and height there"
                )
            decoded = [(annotation, self._pixels(annotation, image)) for annotation in self.annotations[index]]
            paint = official_labels if self.protocol == "official" else self._standard_labels
            maps = paint(decoded, (image.height, image.width))
        image, maps = self.transform(image, maps)
        if "void" in maps:
            maps["void"] = maps["void"].bool()
        return {"image": image, **maps, "sample_id": Path(self.files[index]).stem}

    def _pixels(self, annotation: dict[str, Any], image: Image.Image) -> np.ndarray:
        try:
            return decode(annotation["segmentation"], image.height, image.width)
        except Exception as error:  # pycocotools has no error of its own
            called = f"annotation {annotation.get('id')!r} of image {annotation['image_id']!r}"
            raise DataFileError(f"{str(self.path)!r}: the mask of {called} cannot be read: {error}") from error

    def _standard_labels(
        self, decoded: Sequence[tuple[dict[str, Any], np.ndarray]], shape: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        mask, classes, void, covered = (np.zeros(shape, np.int32) for _ in range(4))
        number = 0
        for annotation, pixels in decoded:
            if annotation.get("iscrowd"):
                void[pixels] = 1
                continue
            number += 1
            mask[pixels] = number
            classes[pixels] = self.categories[annotation["category_id"]]
            covered += pixels
        void[covered > 1] = 1
        return {"mask": mask, "classes": classes, "void": void}


def official_labels(
    decoded: Sequence[tuple[dict[str, Any], np.ndarray]], shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """`mask` as the released code makes it, see `COCO`; sums beyond 255 wrap, as they do in its 8 bits."""
    mask = np.zeros(shape, np.int32)
    for number, (_, pixels) in enumerate(decoded):
        mask += number * pixels.astype(np.int32)
    return {"mask": mask % 256}


def _has_mask(entry: dict[str, Any]) -> bool:
    box = entry.get("bbox") or [0, 0, 1, 1]
    return bool(entry["segmentation"]) and min(box[2:], default=1) > 0
