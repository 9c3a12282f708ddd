"""MOVi-C and MOVi-E as folders of frames (`tools/prepare_data.py movi` writes them from TFDS's files)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from core.data import MissingDataError, data_root, load_labels
from core.data.sources.files import image_files, is_folder, listed
from slot_walks.data.files import load_pair
from slot_walks.data.transforms import CropTrain, Square

_LAYOUT = """\
<level>/train/rgb/<clip>/*.jpg ...        <level>/train/seg/<clip>/*.png ...
<level>/validation/rgb/<clip>/*.jpg ...   <level>/validation/seg/<clip>/*.png ...   (level: C or E)"""
_PREPARE = (
    "python tools/prepare_data.py movi paper=slot_walks source=movi_c/256x256/1.0.0 output=ROOT level=C   "
    "(the 256 x 256 release: training crops 224 pixels)"
)


class MOVi(Dataset):
    """Single frames of synthetic clips; in evaluation with instances.

    Samples: `image` `(3, H, W)` float32; `sample_id`, `<clip>/<frame>`; with `masks` also `mask` `(h, w)` int64,
    instances from 1 on, 0 is background.

    Args:
        root: folder laid out as described in the error that a missing one gives.
        level: `C` or `E`.
        split: `train` or `validation`.
        transform: of `slot_walks.data.transforms`; None: a random crop of 224 without flip, for `validation` both
            sides to 128.
        frames: of every clip, so many are used, drawn once; None: 9 in training (as released), else all.
        seed: of that draw, which depends on nothing but it and the clip's name.
        masks: give `mask`; None: for `validation` only.

    Raises:
        MissingDataError: no such folder, or no frames.
        ValueError: unknown level or split, or less than one frame.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        level: str = "C",
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        frames: int | None = None,
        seed: int = 0,
        masks: bool | None = None,
    ) -> None:
        if level not in ("C", "E") or split not in ("train", "validation"):
            raise ValueError(f"MOVi: level={level!r}, split={split!r}; use C or E, and train or validation")
        if frames is not None and frames < 1:
            raise ValueError(f"MOVi: frames={frames} is less than one")
        base = data_root(root, what="MOVi", layout=_LAYOUT, prepare=_PREPARE) / level / split
        self.folder = data_root(base / "rgb", what=f"MOVi-{level} {split}", layout=_LAYOUT, prepare=_PREPARE)
        self.labels = base / "seg"
        if frames is None and split == "train":
            frames = 9
        self.frames: list[str] = []
        for clip in [entry.name for entry in listed(self.folder) if is_folder(entry)]:
            names = chosen_frames(image_files(self.folder / clip), frames, clip, seed)
            self.frames += [f"{clip}/{name}" for name in names]
        if not self.frames:
            raise MissingDataError(f"MOVi: {self.folder} holds no frame; expected\n{_LAYOUT}\nprepare  {_PREPARE}")
        self.masks = split != "train" if masks is None else masks
        train = CropTrain(short=None, flip=0.0)
        self.transform = transform or (train if split == "train" else Square(normalize="imagenet"))

    def __len__(self) -> int:
        return len(self.frames)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / self.frames[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        frame = Path(self.frames[index]).with_suffix("")
        path = self.labels / frame.with_suffix(".png")
        image, maps = load_pair(self.describe(index), **({"mask": (path, load_labels(path))} if self.masks else {}))
        image, maps = self.transform(image, maps)
        return {"image": image, **maps, "sample_id": frame.as_posix()}


def chosen_frames(names: list[str], count: int | None, clip: str, seed: int) -> list[str]:
    """`count` of the names in their order, the same ones whenever they are drawn; all where there are no more."""
    if count is None or count >= len(names):
        return names
    rng = np.random.default_rng([seed, *clip.encode()])
    return [names[i] for i in sorted(rng.choice(len(names), count, replace=False))]
