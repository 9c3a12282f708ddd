"""Videos as files, and several videos side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.output.media import write_media

SUFFIXES = (".gif", ".mp4")


def to_pixels(video: Tensor, *, rescale: bool = False, truncate: bool = False) -> np.ndarray:
    """Frames `(f, H, W, 3)` in uint8.

    Args:
        video: `(3, f, H, W)` in [0, 1].
        rescale: it is in [-1, 1].
        truncate: cut fractions off, as the released code does, instead of rounding.

    Raises:
        ValueError: another shape.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"video is {tuple(video.shape)}: (3, f, H, W) is expected")
    video = video.detach().float().cpu()
    video = 255 * ((video + 1) / 2 if rescale else video).clamp(0, 1)
    return (video if truncate else video.round()).to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()


def video_grid(videos: Tensor, n_rows: int = 4, *, rescale: bool = False, truncate: bool = False) -> np.ndarray:
    """Videos beside each other, two black pixels around each: frames `(f, H, W, 3)` in uint8.

    Args:
        videos: `(b, 3, f, h, w)` in [0, 1].
        n_rows: videos in a line (the name is torchvision's).
        rescale, truncate: see `to_pixels`.
    """
    from torchvision.utils import make_grid

    lines = torch.stack([make_grid(frames, nrow=n_rows) for frames in videos.float().cpu().unbind(2)], dim=1)
    if rescale:
        # The frame of a grid is what black is before rescaling, as in the released code.
        lines = (lines + 1) / 2
    return to_pixels(lines, truncate=truncate)


def save_video(
    video: Tensor | np.ndarray | Sequence[Image.Image], path: str | os.PathLike[str], fps: float = 8.0
) -> Path:
    """Writes a GIF or MP4 by the path's suffix, or without one a folder of frames `00000.png`, ...

    Args:
        video: `(3, f, H, W)` in [0, 1], `(b, 3, f, H, W)` (side by side), or uint8 `(f, H, W, 3)`; or a video as
            diffusers gives it: `(f, 3, H, W)` (three frames are read as `(3, f, H, W)`), an array `(f, H, W, 3)`, both
            in [0, 1], or a list of images.
        path: the file or folder.
        fps: frames per second.

    Returns:
        The path.

    Raises:
        ValueError: another shape or suffix, or MP4 cannot be written here.
    """
    path = Path(path)
    pixels = _pixels(video)
    if path.suffix.lower() in SUFFIXES:
        return write_media(pixels, path.with_suffix(""), fps=fps, video=path.suffix.lower()[1:])
    if path.suffix:
        raise ValueError(f"{path}: videos are written as {', '.join(SUFFIXES)}, or as a folder of frames")
    path.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(pixels):
        write_media(frame, path / f"{i:05d}")
    return path


def _pixels(video: Tensor | np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    """Frames `(f, H, W, 3)` in uint8 from any of the forms that `save_video` takes."""
    if isinstance(video, Sequence):
        frames = [np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame) for frame in video]
        if len({frame.shape for frame in frames}) != 1:
            raise ValueError(f"a video is a list of frames of one size, not {len(frames)} of {frames[:1]}")
        video = np.stack(frames)
    if isinstance(video, np.ndarray) and video.dtype.kind == "f":
        last = video.ndim == 4 and video.shape[-1] == 3
        video = torch.from_numpy(video).permute(3, 0, 1, 2) if last else torch.from_numpy(video)
    if isinstance(video, Tensor) and video.is_floating_point():
        if video.numel() and not -0.01 <= video.min() <= video.max() <= 1.01:  # rounding aside
            raise ValueError(f"a video is in [0, 1], not in [{video.min():.3g}, {video.max():.3g}]")
        if video.ndim == 5:
            return video_grid(video)
        return to_pixels(video.movedim(0, 1) if video.ndim == 4 and video.shape[0] != 3 == video.shape[1] else video)
    return np.asarray(video)
