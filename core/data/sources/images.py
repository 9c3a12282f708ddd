"""Images and label maps from files, bytes and arrays: nothing else in this repository opens an image."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from core.errors import DataFileError, MissingDataError, VitrineError

_ORIENTATION = 274  # Exif's tag
# Its values. Not ImageOps.exif_transpose, which writes the rest of the Exif data anew and fails on some cameras' own.
_TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
# Grey values of fewer than 8 bits are spread over 0 to 255 by Pillow.
_SPREAD = {"L;2": 85, "L;4": 17}
# Grey values that Pillow turns round, and colours that it cuts to 8 bits: the labels are lost.
_ALTERED = ("L;I", "L;2I", "L;4I", "LA;16B", "RGB;16B", "RGB;16L", "RGB;16N", "RGBA;16B", "RGBA;16L", "RGBA;16N")


def load_image(
    source: str | os.PathLike | bytes,
    mode: str = "RGB",
    name: str | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode a file or its bytes, upright: turned as its Exif orientation says.

    Of 16 bits the upper eight are kept. The transparency is left out, as torchvision and OpenCV do, so that a
    transparent pixel has the colour that is stored for it. An animation gives its first frame, a TIFF its first page.

    Args:
        source: path or encoded bytes.
        mode: PIL mode of the result ("RGB", "L", ...).
        name: what to call ``source`` in errors, for bytes.
        size: width and height that labels or boxes of this image refer to. An image that has them as it is stored, and
            would not when turned, stays as it is stored.

    Raises:
        MissingDataError: no such file.
        DataFileError: not an image, a broken one, or one whose values do not say what is white (32-bit integers and
            floats); the message names it.
    """
    with _opened(source, name) as image:
        twelve, pgm = _raw_mode(image) == "I;12", image.format == "PPM"
        image = _upright(image, size)
        if twelve or (pgm and image.mode == "I"):
            image = _grey(image, 4 if twelve else 8)
        return _converted(image, mode)


def load_labels(
    source: str | os.PathLike | bytes, name: str | None = None, encoding: Literal["values", "panoptic"] = "values"
) -> np.ndarray:
    """A label map (H, W) int64: the numbers in the file, upright as `load_image` gives the image that it belongs to.

    The numbers are the indices of a palette image, the values of a grey one (1 to 32 bits), 0 and 1 of a black and
    white one. Colours are labels only where all channels are the same.

    Args:
        source: path or encoded bytes.
        name: what to call ``source`` in errors, for bytes.
        encoding: "panoptic" reads colours as COCO's panoptic maps do: R + 256 G + 65536 B.

    Raises:
        MissingDataError: no such file.
        DataFileError: not an image, a broken one, or one whose values are not labels (colours, floats, transparency,
            JPEG, several pages); the message names it and its mode.
    """
    with _opened(source, name) as image:
        raw, kind = _raw_mode(image), image.format
        where = f"it is {kind or 'an image'} of mode {image.mode}"
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{where} with {image.n_frames} pages or frames, of which one would be the label map")
        if kind in ("JPEG", "MPO"):
            raise ValueError(f"{where}, and JPEG changes values. {_REMEDY}")
        if raw in _ALTERED or (kind == "PPM" and _largest(image) not in (None, 1, 255, 65535)):
            raise ValueError(f"{where} in a form ({raw}) whose values are not kept. {_REMEDY}")
        values = np.asarray(_upright(image)).astype(np.int64)
        if encoding == "panoptic":
            if image.mode != "RGB":
                raise ValueError(f"{where}: a panoptic map has colours (RGB)")
            return values @ np.array([1, 256, 65536])
        if image.mode in ("LA", "PA", "RGBA") and (values[..., -1] == 255).all():
            values = values[..., :-1]
        elif image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N", "RGB"):
            raise ValueError(f"{where}, which is no label map. {_REMEDY}")
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise ValueError(f"{where}, and its channels differ: colours are no labels. {_REMEDY}")
            values = values[..., 0]
        return values // _SPREAD.get(raw, 1)


_REMEDY = "Save the labels as a PNG with a palette or of grey values (8 or 16 bits)"


def load_animation(source: str | os.PathLike | bytes, name: str | None = None) -> tuple[np.ndarray, float]:
    """All frames of an animation, uint8 (T, H, W, 3), and how many seconds they are shown for (0: it does not say).

    Raises:
        MissingDataError, DataFileError: see `load_image`.
    """
    frames, seconds = [], 0.0
    with _opened(source, name) as image:
        for frame in ImageSequence.Iterator(image):
            frames.append(np.array(_converted(frame, "RGB")))
            seconds += frame.info.get("duration", 0) / 1000
        return np.stack(frames), seconds


def to_pil(image: Any, mode: str = "RGB") -> Image.Image:
    """A PIL image in ``mode`` from one in any mode, a uint8 array (H, W) or (H, W, 3), or a uint8 tensor (C, H, W).

    Raises:
        TypeError: pixels of another type.
        ValueError: a PIL image of 32-bit integers or floats.
    """
    if isinstance(image, Tensor):
        array = image.permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()
        image = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"pixels must be uint8, not {image.dtype}")
        image = Image.fromarray(np.ascontiguousarray(image))
    return _converted(image, mode)


def to_uint8(image: Image.Image) -> Tensor:
    """Pixels as a uint8 tensor (C, H, W)."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


# ---------------------------------------------------------------------- files
@contextmanager
def _opened(source: str | os.PathLike | bytes, name: str | None) -> Iterator[Image.Image]:
    """The image that a file holds; whatever goes wrong with it is an error that names it."""
    name = name or ("encoded image" if isinstance(source, bytes) else os.fspath(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except FileNotFoundError as error:
        link = f": it is a link to {os.readlink(source)!r}, which is gone" if os.path.islink(source) else ""
        raise MissingDataError(f"there is no image {name!r}{link}") from error
    except (VitrineError, MemoryError):
        raise
    except Exception as error:  # PIL reports broken files under many types, of which only some name the file
        raise DataFileError(f"cannot decode {name}: {error}") from error


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in a file that is not decoded yet, "L;4" for instance; "" where its format does not say."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _largest(image: Image.Image) -> int | None:
    """The value that stands for white in a PGM or PPM file, where Pillow would stretch the others to it."""
    arguments = image.tile[0][3]
    return arguments[1] if isinstance(arguments, tuple) and len(arguments) > 1 else None


def _upright(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """The image as its Exif orientation says; see `load_image` about `size`."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # broken Exif data beside a whole image
        turn = None
    image.load()
    if turn is None or image.format == "TIFF":  # which Pillow turns as it loads it
        return image
    turned = image.transpose(turn)
    return image if size is not None and image.size == tuple(size) != turned.size else turned


# ---------------------------------------------------------------------- modes
def _converted(image: Image.Image, mode: str) -> Image.Image:
    """An image of any mode in one of 8 bits."""
    if image.mode.startswith("I;16"):
        image = _grey(image, 8)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"its mode is {image.mode}: {kind}, of which none is white by rule. Save it with 8 or 16 bits")
    if image.mode == mode:
        return image
    if image.mode in ("La", "RGBa"):  # multiplied by the transparency
        image = image.convert(image.mode.upper())
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    return image.convert(mode)


def _grey(image: Image.Image, shift: int) -> Image.Image:
    """Grey values of 16 bits (or 12) in the 8 highest ones."""
    return Image.fromarray((np.asarray(image) >> shift).astype(np.uint8))
