"""Domain generalisation: trained on a few images a class of ImageNet, tested on ImageNet and four variants of it.

    <root>/imagenet/annotations/train_meta.list.num_shot_16.seed_<S>   lines "n01440764/....JPEG 0", below train/
    <root>/imagenet/train/<wnid>/...   <root>/imagenet/val/<wnid>/...
    <root>/imagenetv2/imagenetv2-matched-frequency-format-val/<class number>/...
    <root>/imagenet-sketch/images/<wnid>/...
    <root>/imagenet-adversarial/imagenet-a/<wnid>/...
    <root>/imagenet-rendition/imagenet-r/<wnid>/...

A test set is read from `annotations/val_meta.list` in its folder (NOAH's, lines `file class`), or else from its class
folders. ImageNet-A and -R have 200 of the 1,000 classes: `classes` lists them, and samples have `allowed`, so that the
logits of the others are masked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.data import DataFileError, MissingDataError, data_root
from core.data.sources.files import image_files, is_folder, listed
from core.errors import ConfigError
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

CLASSES = 1000
_LAYOUT = """\
root/imagenet/annotations/train_meta.list.num_shot_16.seed_0   root/imagenet/train/<wnid>/   val/<wnid>/
root/imagenetv2/imagenetv2-matched-frequency-format-val/<number>/   root/imagenet-sketch/images/<wnid>/
root/imagenet-adversarial/imagenet-a/<wnid>/   root/imagenet-rendition/imagenet-r/<wnid>/"""
_PREPARE = (
    "copy the lists of data/few-shot/imagenet and data/domain-generalization of NOAH's repository, and unpack the "
    "images of the data sets beside them"
)


@dataclass(frozen=True)
class Variant:
    """A test set: number of images, folder of its class folders, names of its folder, timm's list of its classes."""

    test: int
    images: str
    folders: tuple[str, ...]
    subset: str | None = None


VARIANTS: dict[str, Variant] = {
    "imagenet": Variant(50000, "val", ("imagenet",)),
    "imagenetv2": Variant(10000, "imagenetv2-matched-frequency-format-val", ("imagenetv2",)),
    "imagenet_sketch": Variant(50889, "images", ("imagenet-sketch", "imagenet_sketch")),
    "imagenet_a": Variant(7500, "imagenet-a", ("imagenet-adversarial", "imagenet_a"), "imagenet_a"),
    "imagenet_r": Variant(30000, "imagenet-r", ("imagenet-rendition", "imagenet_r"), "imagenet_r"),
}


@lru_cache(maxsize=1)
def synsets() -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1,000 classes in their order, which timm ships."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def subset_classes(variant: str) -> list[int] | None:
    """Which of the 1,000 classes a variant has, sorted; None: all. timm ships the lists.

    Raises:
        ConfigError: no such variant.
    """
    subset = VARIANTS[chosen("ImageNet's variants", "data", variant, VARIANTS)].subset
    if subset is None:
        return None
    text = (files("timm.data") / "_info" / f"{subset}_indices.txt").read_text()
    return sorted(int(word) for word in text.split())


class DomainGeneralisation(ListedImages):
    """ImageNet with a few images a class for training, and it and its variants for testing.

    Labels are ImageNet's, from 0 to 999, in every variant; further attributes as those of `ListedImages`. Samples of
    ImageNet-A and -R have `allowed` `(1000,)`, true for the classes that can be an answer.

    Args:
        root: folder of all variants, see the module.
        data: a name in `VARIANTS`; training is on `imagenet`.
        split: `train` or `test`.
        shots: images a class in training.
        seed: of the training list.
        norm: see `petl.data.transforms.statistics`.
        aug: `none`, `centre`, or in training `rand` or `simple`, see `TransferTransform`.
        size: side of the result.
        interpolation: by which images are resized.
        backbone: for `norm: backbone`.
        flip: probability of a mirrored image.
        sizes: see `petl.data.VTAB1k`.
        transform: in place of what norm, aug, size and interpolation say.

    Raises:
        ConfigError, MissingDataError, DataFileError: see `petl.data.VTAB1k`; or a class that the variant does not have.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        data: str = "imagenet",
        split: str = "test",
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
        self.data = chosen("DomainGeneralisation", "data", data, VARIANTS)
        self.split = chosen("DomainGeneralisation", "split", split, ("train", "test"))
        training = split == "train"
        if training and data != "imagenet":
            raise ConfigError(f"DomainGeneralisation: data={data} has no training split: training is on data: imagenet")
        if aug in ("rand", "simple") and not training:
            raise ConfigError(f"DomainGeneralisation: aug={aug} on {split}, which is evaluated: use none or centre")
        if transform is None:
            transform = TransferTransform(size, aug, flip, norm, backbone, interpolation)
        entry, what = VARIANTS[data], f"domain generalisation, {data}, {split}"
        base = data_root(root, what="domain generalisation", layout=_LAYOUT, prepare=_PREPARE)
        folder = found_folder(base, entry.folders, what, _LAYOUT)
        name = f"train_meta.list.num_shot_{shots}.seed_{seed}" if training else "val_meta.list"
        path, images = folder / "annotations" / name, folder
        if training or path.is_file():
            names, labels = read_list(path, what, CLASSES, "file class")
            lists = {"lists": hash_lists(path)}
            if data == "imagenet":  # whose lists name files below train/ or val/, those of variants below the folder
                images = folder / ("train" if training else "val")
        else:
            path = images = found_folder(folder, (entry.images,), what, _LAYOUT)
            names, labels = _class_folders(images, what)
            lists = {"lists": "class folders"}
        expected = shots * CLASSES if training else entry.test
        self.classes = subset_classes(data)
        report = {"repeated": check_repeats(what, names, training, str(path))}
        report["whole"] = check_size(what, len(names) - report["repeated"], expected, sizes, str(path))
        if self.classes is not None and (odd := sorted(set(labels.tolist()) - set(self.classes))):
            raise DataFileError(
                f"{what}: {str(path)!r} has images of class {odd[0]} and {len(odd) - 1} others which are not among "
                "its 200: it is the list of another variant"
            )
        # All 1,000 classes are trained on; nothing of the variants is.
        trained = labels if training else np.arange(CLASSES)
        self._allowed = None
        if self.classes is not None:
            self._allowed = torch.zeros(CLASSES, dtype=torch.bool)
            self._allowed[self.classes] = True
        report |= examine(what, names, labels, trained, CLASSES, training)
        origin = {"data": "domain_generalisation", "task": data, "split": split, "source": "released", **lists}
        if training:
            origin |= {"shots": shots, "seed": seed}
        super().__init__(images, names, labels, CLASSES, transform, origin, report)
        if not os.path.isfile(self.describe(0)):
            raise MissingDataError(f"{what}: there is no image {self.describe(0)!r}. Expected is\n{_LAYOUT}")

    def sample(self, index: int, image: Tensor) -> dict[str, Any]:
        """The sample that has this tensor for its image."""
        allowed = {} if self._allowed is None else {"allowed": self._allowed}
        return {**super().sample(index, image), **allowed}


def _class_folders(root: Path, what: str) -> tuple[list[str], np.ndarray]:
    """Images of folders named by WordNet id, or by class number (ImageNet-V2)."""
    numbers = {wnid: number for number, wnid in enumerate(synsets())}
    names, labels = [], []
    for entry in listed(root):
        if not is_folder(entry):
            continue
        number = numbers.get(entry.name, int(entry.name) if entry.name.isdecimal() else -1)
        if not 0 <= number < CLASSES:
            raise DataFileError(f"{what}: {entry.path!r} is named by no WordNet id of ImageNet and no class number")
        found = image_files(entry.path)
        names += [f"{entry.name}/{file}" for file in found]
        labels += [number] * len(found)
    if not names:
        raise MissingDataError(f"{what}: there is no image below {str(root)!r}. Expected is\n{_LAYOUT}")
    return names, np.array(labels, dtype=np.int64)
