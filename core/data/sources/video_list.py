"""Labelled videos named in a list file, as Kinetics, Something-Something and UCF-101 are given."""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from einops import rearrange
from torch.utils.data import Dataset
from torchvision import tv_tensors

from core.data.errors import data_root
from core.data.sources.files import read_labels
from core.data.sources.packed import PackedStrings
from core.data.sources.video import Mode, VideoReader, sample_indices

_LAYOUT = "<list_file>            lines: path label\nroot/<path>            the videos"


class VideoList(Dataset):
    """``{"video": (C, T, H, W), "label": int, "sample_id": path}``, decoding only the frames that are sampled.

    With ``clips`` a sample holds V views, (V, C, T, H, W).

    Args:
        list_file: one ``path label`` per line; the label is behind the last blank, so paths may hold blanks.
        root: folder that the paths start from.
        frames, mode, stride, short: see :func:`core.data.sample_indices`.
        clips: views for evaluation.
        train: draw the frames at random where the mode does.
        transform: of a tv_tensors.Video (T, C, H, W) uint8, or (V T, C, H, W) with ``clips``, so that one random choice
            holds for all frames: torchvision's v2 transforms do. Without it the video is uint8.
        short_side: decode to this size.

    Raises:
        MissingDataError: no list, no root, or a malformed line (with its number).
        DataFileError: a list in another encoding than UTF-8, or that cannot be read.
    """

    def __init__(
        self,
        list_file: str | os.PathLike | None,
        root: str | os.PathLike | None = None,
        frames: int = 16,
        mode: Mode = "dense",
        stride: int = 1,
        clips: int | None = None,
        train: bool = False,
        transform: Callable[[Any], torch.Tensor] | None = None,
        short_side: int | None = None,
        short: Literal["clamp", "loop", "error"] = "clamp",
    ) -> None:
        path = data_root(list_file, what="VideoList list", layout=_LAYOUT, key="list_file", kind="file")
        self.root = path.parent if root is None else data_root(root, what="VideoList root", layout=_LAYOUT)
        self.frames = frames
        self.mode = mode
        self.stride = stride
        self.clips = clips
        self.train = train
        self.transform = transform
        self.short_side = short_side
        self.short = short
        names, self.labels = read_labels(path, None, "'path label'", "video")
        self.files = PackedStrings(names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        reader = VideoReader(self.describe(index), short_side=self.short_side)
        picked = sample_indices(
            len(reader),
            self.frames,
            self.mode,
            stride=self.stride,
            train=self.train,
            clips=self.clips,
            short=self.short,
        )
        video: torch.Tensor = tv_tensors.Video(rearrange(reader.read(picked.flatten()), "t h w c -> t c h w"))
        if self.transform is not None:
            video = self.transform(video)
        video = video.as_subclass(torch.Tensor)
        pattern = "t c h w -> c t h w" if self.clips is None else "(v t) c h w -> v c t h w"
        video = rearrange(video, pattern, **({} if self.clips is None else {"v": self.clips})).contiguous()
        return {"video": video, "label": int(self.labels[index]), "sample_id": self.files[index]}

    def describe(self, index: int) -> str:
        """The file of a sample."""
        return str(self.root / self.files[index])
