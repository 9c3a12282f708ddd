"""Clips of videos as for Kinetics-400: one random crop for all frames in training, several views in the test.

List files are read by `core.data.VideoList`; here stands what happens to the frames.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from core.data import VideoList, VideoReader, sample_indices
from core.layers.statistics import IMAGENET_MEAN, IMAGENET_STD


@dataclass
class ClipTrainTransform:
    """A random part of the picture, stretched to a square and perhaps mirrored, the same for all frames.

    From uint8 frames `(..., 3, H, W)` to float32 `(..., 3, size, size)`.

    Args:
        size: side of the crop.
        scale: smallest and largest share of the area.
        ratio: smallest and largest aspect ratio.
        flip: probability of mirroring; 0 where left and right matter.
        mean: of the channels, in units of [0, 1].
        std: deviation of the channels.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    _crop: Callable[[Tensor], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "mean", "std"):
            setattr(self, name, tuple(getattr(self, name)))
        self._crop = v2.Compose(
            [
                v2.RandomResizedCrop(self.size, scale=self.scale, ratio=self.ratio, antialias=True),
                v2.RandomHorizontalFlip(self.flip),
            ]
        )

    def __call__(self, frames: Tensor) -> Tensor:
        return normalise(self._crop(frames), self.mean, self.std)


@dataclass
class ClipEvalTransform:
    """The centre of every frame: from uint8 `(..., 3, H, W)` to float32 `(..., 3, size, size)`.

    Args:
        size: side of the crop.
        resize: shorter side before it; None: as it comes.
        mean: of the channels, in units of [0, 1].
        std: deviation of the channels.
    """

    size: int = 224
    resize: int | None = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)

    def __call__(self, frames: Tensor) -> Tensor:
        if self.resize is not None:
            frames = F.resize(frames, [self.resize], antialias=True)
        return normalise(F.center_crop(frames, [self.size, self.size]), self.mean, self.std)


def normalise(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 `(..., C, H, W)` to float32, by the channels' mean and deviation in units of [0, 1]."""
    return F.normalize(F.to_dtype(frames.as_subclass(Tensor), torch.float32, scale=True), list(mean), list(std))


def spatial_crops(frames: Tensor, size: int, count: int) -> Tensor:
    """Squares along the longer side: `(..., H, W)` with a shorter side of `size` to `(count, ..., size, size)`.

    They are spread evenly from one end to the other, the top or left one first; a single one is in the middle.

    Raises:
        ValueError: frames smaller than the squares, or no square.
    """
    room = [side - size for side in frames.shape[-2:]]
    if min(room) < 0 or count < 1:
        raise ValueError(f"{count} crops of {size}x{size} do not come out of frames {tuple(frames.shape[-2:])}")
    at = torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.tensor([0.5])
    long = int(room[1] > room[0])
    crops = []
    for share in at.tolist():
        start = [side // 2 for side in room]
        start[long] = round(share * room[long])
        crops.append(frames[..., start[0] : start[0] + size, start[1] : start[1] + size])
    return torch.stack(crops)


@dataclass
class ClipViews:
    """Several views of a video file: clips spread over its length, squares over its width (or height).

    Called with a path, it gives float32 `(clips * crops, 3, frames, size, size)`, the crops of the first clip first.

    Args:
        frames: of a clip.
        stride: distance of neighbouring frames of a clip.
        clips: clips of a video, from its beginning to its end.
        crops: squares of a frame.
        size: side of the squares; frames are decoded with this shorter side.
        short: what stands for frames behind the end of a short video, see `core.data.sample_indices`.
        mean: of the channels, in units of [0, 1].
        std: deviation of the channels.
    """

    frames: int = 32
    stride: int = 2
    clips: int = 4
    crops: int = 3
    size: int = 224
    short: Literal["clamp", "loop", "error"] = "loop"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)

    def __call__(self, path: str | os.PathLike) -> Tensor:
        reader = VideoReader(path, short_side=self.size)
        picked = sample_indices(
            len(reader), self.frames, "dense", stride=self.stride, clips=self.clips, short=self.short
        )
        frames = rearrange(reader.read(picked.flatten()), "(v t) h w c -> v t c h w", v=self.clips)
        views = rearrange(spatial_crops(frames, self.size, self.crops), "s v t c h w -> (v s) t c h w")
        return rearrange(normalise(views, self.mean, self.std), "n t c h w -> n c t h w").contiguous()


class MultiViewVideos(VideoList):
    """`{"video": (V, C, T, H, W), "label": int, "sample_id": path}`: the views of every video of a list file.

    Args:
        list_file: see `core.data.VideoList`.
        views: what makes the views from a path, by default Kinetics' 4 clips of 3 crops.
        root: folder that the paths start from; None: that of the list file.

    Raises:
        MissingDataError: see `core.data.VideoList`.
    """

    def __init__(
        self,
        list_file: str | os.PathLike | None,
        views: Callable[[Path], Tensor] | None = None,
        root: str | os.PathLike | None = None,
    ) -> None:
        super().__init__(list_file, root)
        self.views = ClipViews() if views is None else views

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "video": self.views(Path(self.describe(index))),
            "label": int(self.labels[index]),
            "sample_id": self.files[index],
        }
