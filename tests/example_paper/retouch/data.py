"""Images in a folder, each with a hole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.data import MissingDataError, load_image


class Images(Dataset):
    """The PNG files of `root/split`; a square of a quarter of the height and of the width is black.

    Args:
        root: folder of the data set.
        split: train or val.
        random_holes: a hole in another place every time; else one that hangs on the image's number alone.

    Raises:
        MissingDataError: there are no PNG files.
    """

    def __init__(self, root: str, split: str, random_holes: bool = False) -> None:
        self.files = sorted((Path(root) / split).glob("*.png"))
        self.random_holes = random_holes
        if not self.files:
            raise MissingDataError(
                f"no PNG files in {Path(root) / split}: "
                f"tools/prepare_data.py paper=retouch task=retouch_images output={root} draws some"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = to_tensor(load_image(self.files[index]))
        draw = random if self.random_holes else random.Random(index)
        damaged, hole = cut(image, *[draw.randrange(side - side // 4 + 1) for side in image.shape[1:]])
        return {"image": image, "damaged": damaged, "hole": hole, "sample_id": self.files[index].name}


def to_tensor(image: Image.Image) -> Tensor:
    """`(3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def cut(image: Tensor, top: int, left: int) -> tuple[Tensor, Tensor]:
    """`image` `(3, H, W)` with a black square of `H/4` by `W/4` at `top`, `left`, and the square's mask `(1, H, W)`."""
    hole = torch.zeros(1, *image.shape[1:])
    hole[:, top : top + image.shape[1] // 4, left : left + image.shape[2] // 4] = 1
    return image * (1 - hole), hole
