"""Frames of a clip from a video file, a folder of pictures or an array: which of them, and at what size."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from core.data import DataFileError, MissingDataError, VideoError, VideoReader, load_animation, load_image
from core.data.sources.files import IMAGE_EXTENSIONS, image_files
from core.data.sources.images import to_uint8
from core.errors import ConfigError

Resize = Literal["stretch", "center_crop", "pad"]
Pad = Literal["none", "loop", "mirror"]

VIDEO_EXTENSIONS = (".mp4", ".gif", ".avi", ".mov", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class FrameSource:
    """A clip whose frames can be asked for.

    name    for messages and ids
    count   frames
    fps     frames per second; None where nothing says it
    read    from frame numbers, and a size (height, width) or None, to uint8 (n, 3, H, W), or float32 in [-1, 1] where
            the source is float; the size is only a hint that a decoder may follow, by stretching
    """

    name: str
    count: int
    read: Callable[[list[int], tuple[int, int] | None], Tensor]
    fps: float | None = None


def open_frames(source: str | os.PathLike | np.ndarray | Tensor) -> FrameSource:
    """A clip from what a user has.

    Args:
        source: a video file; a folder with one picture per frame, in the order of the numbers in their names; or
            frames: uint8 (f, H, W, 3), or float (f, 3, H, W) in [-1, 1].

    Raises:
        MissingDataError: no such file or folder, or no pictures in it.
        ValueError: an array of another type or shape.
        core.data.VideoError: the file is no video.
    """
    if isinstance(source, np.ndarray | Tensor):
        return _array(torch.as_tensor(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise MissingDataError(
            f"there is no clip {str(path)!r}: give a video file, or a folder with one picture per frame"
        )
    return _video(path)


def is_clip(path: Path) -> bool:
    """Whether a path is a video file by its name, or a folder that holds pictures."""
    if path.is_dir():
        return bool(image_files(path))
    return path.name.lower().endswith(VIDEO_EXTENSIONS)


def natural(name: str) -> list[Any]:
    """A key that sorts frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _video(path: Path) -> FrameSource:
    if path.suffix.lower() == ".gif":  # decoders of videos draw frames of their own rate
        return _gif(path)
    reader = VideoReader(path)

    def read(indices: list[int], size: tuple[int, int] | None) -> Tensor:
        # decord cannot hand over some small widths (16, 24, 48, 72): then the file's own size, read in one go.
        with suppress(VideoError):
            sized = reader if size is None else VideoReader(path, width=size[1], height=size[0])
            return rearrange(sized.read(indices), "f h w c -> f c h w")
        if size is not None:
            return read(indices, None)
        return _decode_all(path)[indices]

    return FrameSource(path.stem, len(reader), read, reader.fps)


def _gif(path: Path) -> FrameSource:
    """The frames that the file has, whatever time each is shown for; the rate is the mean one."""
    try:
        decoded, seconds = load_animation(path)
    except DataFileError as error:
        raise VideoError(f"{path} holds no frames that can be decoded ({error}): get it again") from None
    frames = rearrange(torch.from_numpy(decoded), "f h w c -> f c h w")
    fps = len(frames) / seconds if seconds else None
    return FrameSource(path.stem, len(frames), lambda indices, size: frames[indices], fps)


def _decode_all(path: Path) -> Tensor:
    """Every frame of a small video, (f, 3, H, W) uint8, through OpenCV."""
    import cv2

    video = cv2.VideoCapture(str(path))
    frames = []
    while (found := video.read())[0]:
        frames.append(torch.from_numpy(cv2.cvtColor(found[1], cv2.COLOR_BGR2RGB)))
    video.release()
    if not frames:
        raise VideoError(f"{path} holds no frames that can be decoded")
    return rearrange(torch.stack(frames), "f h w c -> f c h w")


def _folder(path: Path) -> FrameSource:
    names = sorted(image_files(path), key=natural)
    if not names:
        raise MissingDataError(f"{path} holds no picture: expected one per frame ({', '.join(IMAGE_EXTENSIONS)})")

    def read(indices: list[int], size: tuple[int, int] | None) -> Tensor:
        once = {i: to_uint8(load_image(path / names[i])) for i in sorted(set(indices))}
        first = once[indices[0]].shape
        for i, frame in once.items():
            if frame.shape != first:
                sizes = f"{frame.shape[2]} x {frame.shape[1]}, not {first[2]} x {first[1]} as {names[indices[0]]}"
                raise ValueError(f"{path / names[i]} is {sizes}: the frames of a clip have one size")
        return torch.stack([once[i] for i in indices])

    return FrameSource(path.name, len(names), read)


def _array(frames: Tensor) -> FrameSource:
    if frames.ndim == 4 and frames.dtype == torch.uint8 and frames.shape[3] == 3:
        frames = rearrange(frames, "f h w c -> f c h w")
    elif frames.ndim != 4 or not frames.is_floating_point() or frames.shape[1] != 3:
        raise ValueError(
            f"frames are {tuple(frames.shape)} {frames.dtype}: give uint8 (f, H, W, 3), or float (f, 3, H, W), -1 to 1"
        )
    else:
        frames = frames.float()
    if 0 in frames.shape:
        raise ValueError(f"frames are {tuple(frames.shape)}: a clip needs at least one")
    return FrameSource("array", len(frames), lambda indices, size: frames[indices])


# ---------------------------------------------------------------------- which frames
def clip_indices(
    total: int, n_frames: int | None, start: int = 0, stride: int = 1, pad: Pad = "none", name: str = "the clip"
) -> list[int]:
    """Numbers of the frames start, start + stride, ..., `n_frames` of them.

    Args:
        total: frames that there are.
        n_frames: how many are wanted; None: all to the end.
        start: the first one.
        stride: distance of two.
        pad: where there are too few: `none` is an error, `loop` begins again, `mirror` runs back and forth.
        name: of the clip, for errors.

    Raises:
        ConfigError: too few frames (says what would fit), or numbers that make no clip.
    """
    if stride < 1 or start < 0 or (n_frames is not None and n_frames < 1):
        raise ConfigError(f"n_frames={n_frames}, start={start}, stride={stride}: at least 1, 0 and 1")
    if pad not in ("none", "loop", "mirror"):
        raise ConfigError(f"pad={pad}: none, loop or mirror")
    if start >= total:
        raise ConfigError(f"start={start}, but {name} has {total} frames, 0 to {total - 1}")
    there = list(range(start, total, stride))
    if n_frames is None or n_frames <= len(there):
        return there[:n_frames]
    if pad == "none":
        fits = (total - start - 1) // (n_frames - 1)
        finer = f"stride={fits}, " if 1 <= fits < stride else ""
        raise ConfigError(
            f"{name} has {total} frames, and with start={start}, stride={stride} that is {len(there)} of the "
            f"{n_frames} wanted: use n_frames={len(there)}, {finer}pad=loop or pad=mirror"
        )
    if pad == "loop" or len(there) == 1:
        return [there[i % len(there)] for i in range(n_frames)]
    back_and_forth = there + there[-2:0:-1]
    return [back_and_forth[i % len(back_and_forth)] for i in range(n_frames)]


# ---------------------------------------------------------------------- size
def as_size(size: int | tuple[int, int] | list[int] | None) -> tuple[int, int] | None:
    """Height and width from a config's value: one number is both.

    Raises:
        ConfigError: something else.
    """
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
        raise ConfigError(f"size={size}: one number, or height and width")
    return pair


def check_multiple(height: int, width: int, multiple: int, what: str) -> None:
    """Refuses sizes that an autoencoder cannot halve as often as it does.

    Raises:
        ConfigError: names the nearest size that fits.
    """
    if height % multiple or width % multiple:
        near = [max(multiple, multiple * round(n / multiple)) for n in (height, width)]
        raise ConfigError(
            f"{what} is {height} x {width} (height x width), which are no multiples of {multiple}: "
            f"use size=[{near[0]},{near[1]}]"
        )


def fit(frames: Tensor, size: tuple[int, int], resize: Resize = "stretch") -> Tensor:
    """Frames (f, 3, H, W) at `size`, of the type they have.

    Args:
        frames: uint8, or float in [-1, 1].
        size: height and width.
        resize: `stretch` ignores the aspect ratio, as the released code does; `center_crop` fills the size and cuts
            off what stands over; `pad` shows everything, with black beside it.

    Raises:
        ConfigError: another `resize`.
    """
    if resize not in ("stretch", "center_crop", "pad"):
        raise ConfigError(f"resize={resize}: stretch, center_crop or pad")
    height, width = frames.shape[-2:]
    if (height, width) == size:
        return frames
    if resize == "stretch":
        return _scaled(frames, size)
    ratios = (size[0] / height, size[1] / width)
    ratio = max(ratios) if resize == "center_crop" else min(ratios)
    scaled = _scaled(frames, tuple(max(1, round(n * ratio)) for n in (height, width)))
    if resize == "center_crop":
        return F.center_crop(scaled, list(size))
    above, before = ((want - have) // 2 for want, have in zip(size, scaled.shape[-2:], strict=True))
    below, behind = size[0] - scaled.shape[-2] - above, size[1] - scaled.shape[-1] - before
    return F.pad(scaled, [before, above, behind, below], fill=0 if frames.dtype == torch.uint8 else -1)


def _scaled(frames: Tensor, size: tuple[int, ...]) -> Tensor:
    scaled = F.resize(frames, list(size), F.InterpolationMode.BICUBIC, antialias=True)
    return scaled if frames.dtype == torch.uint8 else scaled.clamp(frames.min(), frames.max())


def to_float(frames: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]; float stays."""
    return frames / 127.5 - 1 if frames.dtype == torch.uint8 else frames
