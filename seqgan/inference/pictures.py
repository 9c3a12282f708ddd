"""Pictures of images, reconstructions and codes, as uint8 arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

_GAP = 2  # white pixels between pictures


def to_pixels(images: Tensor) -> np.ndarray:
    """Images `(B, 3, H, W)` in [-1, 1] as uint8 `(B, H, W, 3)`; values beyond are cut off."""
    scaled = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(scaled, "b c h w -> b h w c").cpu().numpy()


def from_pixels(pixels: np.ndarray) -> Tensor:
    """Images uint8 `(B, H, W, 3)` as `(B, 3, H, W)` in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(pixels)), "b h w c -> b c h w").float() / 127.5 - 1


def grid(images: np.ndarray | Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures of one size, row by row.

    Args:
        images: uint8, N of `(H, W, 3)`.
        columns: per row; None: as square as it goes.

    Raises:
        ValueError: no pictures.
    """
    if not len(images):
        raise ValueError("a grid needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(images)))
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def strips(*columns: np.ndarray) -> np.ndarray:
    """Rows of pictures side by side: column i shows `columns[i]`, uint8 `(B, H, W, 3)` each."""
    return grid([picture for row in zip(*columns, strict=True) for picture in row], len(columns))


def code_colours(codebook: Tensor) -> Tensor:
    """A colour `(K, 3)` in [0, 1] for every code `(K, C)`: its place along the codebook's three main directions.

    Codes that lie near each other look alike.
    """
    centred = codebook.detach().float().cpu()
    centred = centred - centred.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    # A direction's sign is arbitrary: the component that is largest in size becomes positive.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    places = centred @ (directions * largest.sign()).T
    if places.shape[1] < 3:
        places = torch.nn.functional.pad(places, (0, 3 - places.shape[1]))
    low, high = places.amin(dim=0), places.amax(dim=0)
    return (places - low) / (high - low).clamp_min(1e-12)


def code_maps(indices: Tensor, colours: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Maps of codes `(B, h, w)` in their colours `(K, 3)`, uint8 `(B, H, W, 3)`."""
    maps = rearrange(colours[indices.cpu()], "b h w c -> b c h w")
    return to_pixels(torch.nn.functional.interpolate(maps, size=size) * 2 - 1)
