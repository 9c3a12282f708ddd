"""Images from files, bytes and arrays."""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.data.errors import DataFileError, MissingDataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_image(source: str | os.PathLike | bytes, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Decode a file or its bytes.

    Args:
        source: path or encoded bytes.
        mode: PIL mode of the result ("RGB", "L", ...).
        name: what to call ``source`` in errors, for bytes.

    Raises:
        MissingDataError: no such file.
        DataFileError: not an image, or a broken one; the message names it.
    """
    name = name or ("encoded image" if isinstance(source, bytes) else os.fspath(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert(mode)
    except FileNotFoundError as error:
        raise MissingDataError(f"there is no image {name!r}") from error
    except MemoryError:
        raise
    except Exception as error:  # PIL reports broken files under many types, of which only some name the file
        raise DataFileError(f"cannot decode {name}: {error}") from error


def to_pil(image: Any, mode: str = "RGB") -> Image.Image:
    """A PIL image in ``mode`` from one in any mode, a uint8 array (H, W) or (H, W, 3), or a uint8 tensor (C, H, W)."""
    if isinstance(image, Tensor):
        array = image.permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()
        image = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"pixels must be uint8, not {image.dtype}")
        image = Image.fromarray(np.ascontiguousarray(image))
    return image if image.mode == mode else image.convert(mode)


def to_uint8(image: Image.Image) -> Tensor:
    """Pixels as a uint8 tensor (C, H, W)."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
