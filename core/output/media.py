"""Pictures and videos as files: PNG, animated GIF, MP4."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

Media = Any  # uint8 (H, W, 3) | uint8 (T, H, W, 3), as numpy array or tensor | path of a finished file

# VP9 plays in browsers; the second is what every OpenCV build can write.
_MP4_CODECS = ("vp09", "mp4v")


def as_pixels(media: Media, name: str) -> np.ndarray:
    """The picture or video as a contiguous uint8 array on the CPU.

    Args:
        media: array or tensor (H, W, 3) or (T, H, W, 3), uint8.
        name: named in errors.

    Raises:
        ValueError: another type or shape.
    """
    array = media.detach().cpu().numpy() if hasattr(media, "detach") else np.asarray(media)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(
            f"media '{name}' is {array.dtype} {array.shape}: a picture is uint8 (H, W, 3), a video uint8 (T, H, W, 3)"
        )
    return np.ascontiguousarray(array)


def write_media(
    media: Media, stem: str | os.PathLike[str], *, fps: float = 8.0, video: Literal["gif", "mp4"] = "gif"
) -> Path:
    """Writes ``stem.png`` from a picture, ``stem.gif`` or ``stem.mp4`` from a video; copies a finished file.

    Args:
        media: see `as_pixels`, or the path of a file.
        stem: path without suffix; its folder is made.
        fps: frames per second of a video; a GIF has at most 50.
        video: format of a video.

    Returns:
        The file.

    Raises:
        ValueError: the array is neither picture nor video, or no MP4 encoder works.
        FileNotFoundError: the finished file does not exist.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(media, str | os.PathLike):
        source = Path(media)
        path = stem.with_name(stem.name + source.suffix)
        if source.resolve() != path.resolve():
            shutil.copyfile(source, path)
        return path
    pixels = as_pixels(media, stem.name)
    if pixels.ndim == 4:
        path = stem.with_name(f"{stem.name}.{video}")
        (_write_gif if video == "gif" else _write_mp4)(pixels, path, fps)
        return path
    from PIL import Image

    path = stem.with_name(f"{stem.name}.png")
    Image.fromarray(pixels).save(path)
    return path


def _write_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    """Every frame is one of the file's, for the time that keeps the rate.

    Pillow's own `save` would join frames that are equal, and cut each one's time to hundredths of a second.
    """
    from PIL import Image
    from PIL.GifImagePlugin import getdata, getheader

    images = []
    for i, frame in enumerate(frames):
        changed = (frame != frames[i - 1]).any(axis=2) if i else np.ones(frame.shape[:2], bool)
        changed[0, 0] |= not changed.any()  # a frame has at least one pixel
        (top, bottom), (left, right) = (np.flatnonzero(changed.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0))
        image = Image.fromarray(np.ascontiguousarray(frame[top : bottom + 1, left : right + 1]))
        images.append((image.convert("P", palette=Image.Palette.ADAPTIVE), (left, top)))
    ends = [round(100 * (i + 1) / fps) for i in range(len(frames))]  # GIF counts hundredths of a second
    with path.open("wb") as file:
        file.writelines(getheader(images[0][0], info={"loop": 0})[0])
        for (image, offset), begin, end in zip(images, [0, *ends], ends, strict=False):
            # Viewers show what is shorter than two hundredths much longer.
            file.writelines(getdata(image, offset, duration=10 * max(end - begin, 2), include_color_table=True))
        file.write(b";")


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    import cv2

    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # encoders want even sides
    size = (frames.shape[2], frames.shape[1])
    for codec in _MP4_CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, size)
        try:
            if writer.isOpened():
                for frame in frames:
                    writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
                return
        finally:
            writer.release()
    raise ValueError(f"OpenCV has no working encoder for '{path}': write a GIF instead (video=gif)")
