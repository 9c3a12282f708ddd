"""Clips to tune on and to edit: one file, a folder of clips, DAVIS, LOVEU-TGVE-2023, and drawn ones.

    frames        which frames of a file, folder or array, and at what size
    one_shot      the data set of one clip
    clip_folder   folders of clips, DAVIS
    tgve          the benchmark's table and frames, and the layout of submissions

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ClipFolder": "clip_folder",
    "DAVIS": "clip_folder",
    "DrawnClip": "one_shot",
    "FrameSource": "frames",
    "LoveuTGVE": "tgve",
    "OneShotVideoDataset": "one_shot",
    "Submission": "tgve",
    "TGVEClip": "tgve",
    "clip_indices": "frames",
    "fit": "frames",
    "open_frames": "frames",
    "read_captions": "clip_folder",
    "read_table": "tgve",
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
