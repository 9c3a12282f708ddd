"""The data set of one clip and its caption."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from tune_a_video.data.frames import (
    FrameSource,
    Pad,
    Resize,
    as_size,
    check_multiple,
    clip_indices,
    fit,
    open_frames,
    to_float,
)
from tune_a_video.standin.world import draw_clip


class OneShotVideoDataset(Dataset):
    """One sample: `video` (f, 3, H, W) float32 in [-1, 1], `caption`, `sample_id`. Frames are decoded once.

    Args:
        path: a video file, a folder with one picture per frame, or frames (uint8 (f, H, W, 3), or float (f, 3, H, W)
            in [-1, 1]).
        prompt: the caption.
        n_frames: f; None: all from `start` on.
        start: first frame.
        stride: distance of two frames.
        size: height and width, or one number for both; None: as the frames are.
        resize: `stretch` (as released), `center_crop`, `pad`; see `tune_a_video.data.frames.fit`.
        pad: for clips that are too short: `none` (an error), `loop`, `mirror`.
        multiple: height and width have to be multiples of it; 8 for Stable Diffusion's autoencoder.
        sample_id: None: the name of the file or folder.

    `fps` is the rate of the frames that are taken, None where nothing says it.

    Raises:
        MissingDataError: no such clip.
        ConfigError: the clip is too short, or the size is no multiple; each says what would do.
    """

    def __init__(
        self,
        path: str | os.PathLike | np.ndarray | Tensor,
        prompt: str,
        n_frames: int | None = 24,
        start: int = 0,
        stride: int = 1,
        size: int | tuple[int, int] | None = 512,
        resize: Resize = "stretch",
        pad: Pad = "none",
        multiple: int = 8,
        sample_id: str | None = None,
    ) -> None:
        clip = open_frames(path)
        self.prompt, self.resize, self.multiple = prompt, resize, multiple
        self.size = as_size(size)
        if self.size is not None:
            check_multiple(*self.size, multiple, "size")
        self.sample_id = sample_id or clip.name
        self.fps = clip.fps and clip.fps / stride
        self.indices = clip_indices(clip.count, n_frames, start, stride, pad, clip.name)
        self._clip = clip
        self._frames: Tensor | None = None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in (0, -1):
            raise IndexError(f"sample {index} of a data set of one clip")
        if self._frames is None:
            self._frames = read_sized(self._clip, self.indices, self.size, self.resize, self.multiple)
        return {"video": to_float(self._frames), "caption": self.prompt, "sample_id": self.sample_id}

    def describe(self, index: int) -> str:
        """The clip's name."""
        return self._clip.name


def read_sized(
    clip: FrameSource, indices: list[int], size: tuple[int, int] | None, resize: Resize, multiple: int
) -> Tensor:
    """Frames of a clip at a size; see `OneShotVideoDataset`.

    Raises:
        ConfigError: without a size, frames whose sides are no multiples.
    """
    frames = clip.read(indices, size if resize == "stretch" else None)
    if size is not None:
        return fit(frames, size, resize)
    check_multiple(*frames.shape[-2:], multiple, clip.name)
    return frames


class DrawnClip(Dataset):
    """A clip of the stand-in's world (`tune_a_video.standin.draw_clip`) as a data set of one sample.

    `video` (f, 3, 16, 16), `caption`, `sample_id`, and for measuring `centres` (f, 2), `looks` (3,) and `mask`
    (f, 16, 16) bool, the object.

    Args:
        seed: of the clip.
        n_frames: f.
        path: `straight` or `curved`, see `draw_clip`.
    """

    def __init__(self, seed: int = 0, n_frames: int = 8, path: str = "straight") -> None:
        self.seed = seed
        self.clip = draw_clip(seed, n_frames, path)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in (0, -1):
            raise IndexError(f"sample {index} of a data set of one clip")
        clip = self.clip
        return {
            "video": clip.video,
            "caption": clip.caption,
            "centres": clip.centres,
            "looks": clip.looks,
            "mask": clip.masks,
            "sample_id": f"drawn-{self.seed}",
        }
