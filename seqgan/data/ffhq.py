"""FFHQ: 70,000 faces as PNG files, in one folder or in folders of a thousand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from core.config.files import read_lines
from core.data import MissingDataError, data_root, load_image
from core.data.sources.files import IMAGE_EXTENSIONS, files_below
from seqgan.data.transforms import TokenizerTransform

SPLITS = ("train", "val", "all")
_LAYOUT = """root/00000/00000.png ... root/69000/69999.png   folders of a thousand, as published
root/00000.png ... root/69999.png               or one folder"""


class FFHQ(Dataset):
    """`image`, `label` (0) and `sample_id` of faces; pictures of any size, also thumbnails.

    Args:
        root: folder of the pictures.
        split: `train`, `val` or `all`. Without `list_file`, `val` is the last `val_count` pictures by number.
        transform: of a PIL picture.
        list_file: a text file with a picture a line (`00012.png`, `00000/00012.png` or `00012`), as the lists
            ffhqtrain.txt and ffhqvalidation.txt of VQGAN are; `split` is then only a name.
        val_count: see `split`; 10,000 leaves the 60,000 that the paper trains with.
        count: pictures that have to be there in all; None: no check (a part of FFHQ).

    Raises:
        ValueError: an unknown split.
        core.data.MissingDataError: no folder, no or too few pictures, no list, or a picture of it that is not there.
    """

    classes = ("face",)

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        list_file: str | os.PathLike[str] | None = None,
        val_count: int = 10000,
        count: int | None = 70000,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"FFHQ has no split {split!r}: use {', '.join(SPLITS)}")
        self.root = data_root(root, what="FFHQ", layout=_LAYOUT)
        self.split, self.transform = split, TokenizerTransform() if transform is None else transform
        found = _pictures(self.root)
        if not found:
            raise MissingDataError(f"FFHQ: no picture below {self.root}; expected\n{_LAYOUT}")
        if count is not None and len(found) != count:
            raise MissingDataError(
                f"FFHQ: {len(found)} pictures below {self.root} instead of {count}: finish the download, or set "
                "train_dataloader.dataset.count=null for a part"
            )
        if list_file is not None:
            self.files = _listed(found, Path(list_file), self.root)
        elif split == "all":
            self.files = list(found.values())
        else:
            if not 0 < val_count < len(found):
                raise MissingDataError(
                    f"FFHQ: val_count={val_count} of {len(found)} pictures below {self.root} leaves a split empty: set "
                    "train_dataloader.dataset.val_count (and the others' alike) to fewer"
                )
            files = list(found.values())
            self.files = files[:-val_count] if split == "train" else files[-val_count:]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.files[index]
        return {"image": self.transform(load_image(self.root / name)), "label": 0, "sample_id": name}

    def describe(self, index: int) -> str:
        """The file of a sample."""
        return str(self.root / self.files[index])


def _pictures(root: Path) -> dict[str, str]:
    """Names relative to the root by stem, in order of their numbers."""
    found: dict[str, str] = {}
    for name in files_below(root, IMAGE_EXTENSIONS):
        stem = Path(name).stem
        if stem in found:
            raise MissingDataError(
                f"FFHQ: {root / name} and {root / found[stem]} have the same number: keep one size of the pictures "
                "below the root"
            )
        found[stem] = name
    return dict(sorted(found.items()))


def _listed(found: dict[str, str], list_file: Path, root: Path) -> list[str]:
    if not list_file.is_file():
        raise MissingDataError(
            f"FFHQ: there is no list {list_file}: set train_dataloader.dataset.list_file to a text file with a picture "
            "a line, or to null to split by number"
        )
    stems = [Path(line).stem for _, line in read_lines(list_file)]
    missing = [stem for stem in stems if stem not in found]
    if missing or not stems:
        what = f"{len(missing)} pictures of it are not below {root}, first {missing[0]}" if missing else "it is empty"
        raise MissingDataError(f"FFHQ: {list_file}: {what}; the list belongs to another folder, or the download is cut")
    return [found[stem] for stem in stems]
