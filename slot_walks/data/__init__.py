"""Data sets of the three tasks, in the formats that users have on disk, and scenes that are drawn instead.

    birds, dogs_cars, flowers    foreground extraction
    voc, coco, movi              object discovery (voc also semantic segmentation)
    cocostuff                    semantic segmentation
    standin                      drawn scenes, no download
    transforms                   crops, sizes and value ranges

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Birds": "birds",
    "Blobworld": "standin",
    "COCO": "coco",
    "COCOSTUFF27": "cocostuff",
    "COCOStuff": "cocostuff",
    "Cars": "dogs_cars",
    "CropTrain": "transforms",
    "Dogs": "dogs_cars",
    "Flowers": "flowers",
    "MOVi": "movi",
    "OfficialEval": "transforms",
    "Square": "transforms",
    "StandardEval": "transforms",
    "WholePicture": "transforms",
    "VOC": "voc",
    "VOC_CLASSES": "voc",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
