"""Which frames of a video to take, and reading only those."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from core.errors import DataFileError, MissingDataError

Mode = Literal["uniform", "segments", "dense", "stride"]


class VideoError(DataFileError):
    """A video that cannot be decoded; the message names the file."""


def sample_indices(
    total: int,
    frames: int | None,
    mode: Mode = "uniform",
    *,
    stride: int = 1,
    start: int = 0,
    train: bool = False,
    clips: int | None = None,
    generator: torch.Generator | None = None,
    short: Literal["clamp", "loop", "error"] = "clamp",
) -> Tensor:
    """Frame numbers to read from a video of ``total`` frames.

    Modes:
        ``uniform``: evenly spaced from the first to the last frame (one frame: the middle one). Never random. Several
        clips interleave: clip c takes every ``clips``-th of the evenly spaced frames.

        ``segments`` (TSN, Wang et al. 2016): the video is cut into ``frames`` equal parts; one random frame of each in
        training, the middle one otherwise. Several clips take evenly spaced places inside the parts.

        ``dense`` (I3D, SlowFast): ``frames`` frames, ``stride`` apart, from a random start in training; otherwise the
        middle window, or with several clips evenly spaced windows from the beginning to the end.

        ``stride``: every ``stride``-th frame from ``start`` on, ``frames`` of them, or all to the end of the video with
        ``frames=None``. Never random. Several clips follow each other without a gap.

    Args:
        total: frames of the video.
        frames: frames of a clip, T.
        mode: see above.
        stride: distance of neighbouring frames in ``dense`` and ``stride``.
        start: first frame in ``stride``.
        train: draw at random where the mode does.
        clips: V; None for one clip without that axis.
        generator: for the random modes; torch's global one by default (seeded per sample by SeededDataset).
        short: what stands for frames past the end: the last frame ("clamp"), the video from its beginning again
            ("loop"), or a ValueError ("error").

    Returns:
        int64 (T,), or (V, T) with ``clips``.
    """
    if total < 1:
        raise ValueError(f"a video of {total} frames has nothing to sample")
    if stride < 1 or (clips is not None and clips < 1) or (frames is not None and frames < 1):
        raise ValueError(f"frames, stride and clips must be positive, not {frames}, {stride}, {clips}")
    if frames is None and (mode != "stride" or clips is not None):
        raise ValueError("frames=None (to the end of the video) goes with mode 'stride' and a single clip")
    if start and mode != "stride":
        raise ValueError(f"start goes with mode 'stride', not {mode!r}")
    count = clips or 1
    if mode == "uniform":
        picked = _uniform(total, frames, count)
    elif mode == "segments":
        picked = _segments(total, frames, count, train, generator)
    elif mode == "dense":
        picked = _dense(total, frames, count, stride, train, generator)
    elif mode == "stride":
        if start >= total:
            raise ValueError(f"start {start} lies behind the last of {total} frames")
        length = frames or -(-(total - start) // stride)
        picked = start + stride * torch.arange(count * length).view(count, length)
    else:
        raise ValueError(f"mode must be uniform, segments, dense or stride, not {mode!r}")
    if short == "error" and int(picked.max()) >= total:
        raise ValueError(f"{frames} frames with stride {stride} do not fit into a video of {total} frames")
    picked = picked % total if short == "loop" else picked.clamp(max=total - 1)
    return picked[0] if clips is None else picked


def _uniform(total: int, frames: int, clips: int) -> Tensor:
    count = frames * clips
    if count == 1:
        return torch.tensor([[(total - 1) // 2]])
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().view(frames, clips).T


def _segments(total: int, frames: int, clips: int, train: bool, generator: torch.Generator | None) -> Tensor:
    if train:
        within = torch.rand(clips, frames, generator=generator, dtype=torch.float64)
    else:
        within = ((torch.arange(clips, dtype=torch.float64) + 0.5) / clips)[:, None].expand(clips, frames)
    return ((torch.arange(frames) + within) * (total / frames)).long()


def _dense(total: int, frames: int, clips: int, stride: int, train: bool, generator: torch.Generator | None) -> Tensor:
    room = max(total - ((frames - 1) * stride + 1), 0)
    if train:
        begin = torch.randint(room + 1, (clips,), generator=generator)
    elif clips == 1:
        begin = torch.tensor([room // 2])
    else:
        begin = torch.linspace(0, room, clips, dtype=torch.float64).round().long()
    return begin[:, None] + stride * torch.arange(frames)


class VideoReader:
    """Random access to the frames of a video file, through decord, with one decoding thread.

    Args:
        path: the file.
        width, height: decode to this size; give both. The decoder scales, which is cheaper than scaling frames later.
        short_side: decode so that the shorter side has this many pixels, in place of width and height. Costs one
            decoded frame to learn the size.

    Raises:
        MissingDataError: no such file.
        VideoError: not a video, or a broken one.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        width: int | None = None,
        height: int | None = None,
        short_side: int | None = None,
    ) -> None:
        if (width is None) != (height is None) or (short_side is not None and width is not None):
            raise ValueError("give width and height, or short_side, or none of them")
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise MissingDataError(f"no such video: {self.path!r}")
        if short_side is not None:
            frame_height, frame_width = self._open(None, None)[0].shape[:2]
            # The longer side is cut to whole pixels, as torchvision's Resize does.
            width = max(short_side, int(short_side * frame_width / frame_height))
            height = max(short_side, int(short_side * frame_height / frame_width))
        self._video = self._open(width, height)

    def _open(self, width: int | None, height: int | None) -> Any:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        try:
            video = decord.VideoReader(
                self.path, ctx=decord.cpu(0), width=width or -1, height=height or -1, num_threads=1
            )
            frames = len(video)
        except (decord.DECORDError, RuntimeError) as error:
            raise VideoError(f"{self.path} cannot be opened as a video: {_first_line(error)}") from None
        if frames == 0:
            raise VideoError(f"{self.path} holds no video frames")
        return video

    def __len__(self) -> int:
        return len(self._video)

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        return float(self._video.get_avg_fps())

    def read(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """The frames ``indices``, in that order, as uint8 (T, H, W, 3) RGB.

        Every frame is decoded once, in the order of the file, however often it is asked for.

        Raises:
            IndexError: a number outside the video.
            VideoError: a frame cannot be decoded.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size == 0:
            raise ValueError(f"{self.path}: no frames are asked for")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"{self.path}: frames {wanted.min()}..{wanted.max()} of a video of {len(self)} frames")
        unique, where = np.unique(wanted, return_inverse=True)
        frames = self._decode(unique.tolist())
        return torch.from_numpy(frames if np.array_equal(unique, wanted) else frames[where])

    def _decode(self, unique: list[int]) -> np.ndarray:
        import decord

        try:
            frames = self._video.get_batch(unique)
        except (decord.DECORDError, RuntimeError) as error:
            raise VideoError(f"{self.path}: frames {unique} cannot be decoded: {_first_line(error)}") from None
        # A program that set decord's bridge gets its own tensors from get_batch.
        return frames.asnumpy() if hasattr(frames, "asnumpy") else np.asarray(frames)


def _first_line(error: Exception) -> str:
    """decord's messages go on with a C++ stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
