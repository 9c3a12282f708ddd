"""A text-to-image model small enough for two CPU cores, the world that it draws, and exact readings of its videos.

    world       words and looks, pictures, clips, edits
    networks    picture tower, judge, tiny CLIP, tokenizer
    vae         an autoencoder that is the identity
    training    of all of them
    folder      a Stable Diffusion folder with what evaluates it
    measures    path, words, agreement, joint score, jitter

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Clip": "world",
    "Edit": "world",
    "Judge": "networks",
    "PictureTower": "networks",
    "Reading": "measures",
    "TinyCLIP": "networks",
    "Words": "world",
    "agreement": "measures",
    "all_words": "world",
    "captions": "world",
    "draw_clip": "world",
    "draw_pictures": "world",
    "edits": "world",
    "identity_vae": "vae",
    "jitter": "measures",
    "joint_frames": "measures",
    "load_judge": "folder",
    "load_tiny_clip": "folder",
    "make_scheduler": "training",
    "make_tokenizer": "networks",
    "make_unet": "training",
    "measure": "measures",
    "parse_caption": "world",
    "path_distances": "measures",
    "right_words": "measures",
    "words_of_looks": "world",
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
