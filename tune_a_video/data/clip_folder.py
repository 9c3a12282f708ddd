"""Folders of clips: a user's own, and DAVIS."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.config.files import read_json, read_lines
from core.data import DataFileError, MissingDataError, data_root, load_labels
from core.data.sources.files import image_files, listed
from core.errors import nearest
from tune_a_video.data.frames import (
    Pad,
    Resize,
    as_size,
    check_multiple,
    clip_indices,
    fit,
    is_clip,
    natural,
    open_frames,
    to_float,
)
from tune_a_video.data.one_shot import read_sized

_LAYOUT = """\
root/<clip>/00000.jpg ...    one folder of frames per clip
root/<clip>.mp4              or video files"""
_MASKS = "masks/<clip>/00000.png ...      one label map per frame"
_DAVIS = """\
root/JPEGImages/480p/<clip>/00000.jpg ...
root/ImageSets/2017/val.txt        clips of a split, one a line
root/Annotations/480p/<clip>/00000.png ...      with masks=true"""


class ClipFolder(Dataset):
    """Clips below a folder: `video` (f, 3, H, W) float32 in [-1, 1], `caption`, `sample_id` (the clip's name).

    A clip is called as its folder, or as its file without suffix; with it, where several clips would share a name.

    Args:
        root: holds a folder of frames or a video file per clip.
        captions: clip -> caption, or a file with that: `.json`, or text with `clip caption` in each line. None: all
            are empty.
        names: clips in the order wanted; None: all, sorted. With `captions`: those that have one.
        n_frames, start, stride, size, resize, pad, multiple: see `tune_a_video.data.OneShotVideoDataset`.
        masks: folder of label maps, `masks/<clip>/*.png`, one for each of the clip's frames; samples then hold `mask`
            (f, H, W) bool, true where the map is not 0. None: none.

    Raises:
        MissingDataError: no such folder or file, no clips, or a clip that is not there (near names in the message).
        ConfigError: a clip without a caption, or a malformed line (with its number).
        core.data.DataFileError: another number of masks than frames, or masks of another size.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        captions: Mapping[str, str] | str | os.PathLike | None = None,
        names: Sequence[str] | None = None,
        n_frames: int | None = 24,
        start: int = 0,
        stride: int = 1,
        size: int | tuple[int, int] | None = 512,
        resize: Resize = "stretch",
        pad: Pad = "none",
        multiple: int = 8,
        masks: str | os.PathLike | None = None,
    ) -> None:
        self.root = data_root(root, what=type(self).__name__, layout=_LAYOUT)
        self.masks = None if masks is None else data_root(masks, what="masks", layout=_MASKS)
        there = _named(path for path in map(Path, listed(self.root)) if is_clip(path))
        if not there:
            raise MissingDataError(f"{self.root} holds no clip; expected\n{_LAYOUT}")
        known = captions if captions is None or isinstance(captions, Mapping) else read_captions(captions)
        if names is None:
            names = sorted(there) if known is None else list(known)
        for name in names:
            if name not in there:
                raise MissingDataError(f"{self.root} holds no clip {name!r}{nearest(name, list(there))}")
            if known is not None and name not in known:
                raise MissingDataError(f"clip {name!r} has no caption{nearest(name, list(known))}")
        self.names = list(names)
        self.paths = [there[name] for name in self.names]
        self.captions = ["" if known is None else known[name] for name in self.names]
        self.n_frames, self.start, self.stride = n_frames, start, stride
        self.size, self.resize, self.pad, self.multiple = as_size(size), resize, pad, multiple
        if self.size is not None:
            check_multiple(*self.size, multiple, "size")

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, index: int) -> str:
        """The clip's file or folder."""
        return str(self.paths[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = open_frames(self.paths[index])
        indices = clip_indices(clip.count, self.n_frames, self.start, self.stride, self.pad, str(self.paths[index]))
        frames = read_sized(clip, indices, self.size, self.resize, self.multiple)
        sample = {"video": to_float(frames), "caption": self.captions[index], "sample_id": self.names[index]}
        if self.masks is None:
            return sample
        path = self.paths[index]
        folder = data_root(
            self.masks / (path.name if path.is_dir() else path.stem), what="masks of a clip", layout=_MASKS
        )
        inside = read_masks(folder, indices, clip.count, self.size, self.resize)
        if inside.shape[1:] != frames.shape[2:]:
            raise DataFileError(f"{folder}: masks of {tuple(inside.shape[1:])} for frames of {tuple(frames.shape[2:])}")
        return {**sample, "mask": inside}


def read_masks(folder: Path, indices: list[int], count: int, size: tuple[int, int] | None, resize: Resize) -> Tensor:
    """Where a clip's label maps are not 0, fitted as its frames are: `(f, H, W)` bool, half a pixel counts.

    Args:
        folder: of one image a frame, in the order of the numbers in their names.
        indices: of the frames that are taken.
        count: frames that the clip has.
        size, resize: see `tune_a_video.data.frames.fit`.

    Raises:
        core.data.DataFileError: another number of maps than frames, or maps of several sizes.
    """
    names = sorted(image_files(folder), key=natural)
    if len(names) != count:
        raise DataFileError(f"{folder} holds {len(names)} masks for a clip of {count} frames: one for each is expected")
    maps = {i: torch.from_numpy(load_labels(folder / names[i]) != 0) for i in set(indices)}
    if len({one.shape for one in maps.values()}) > 1:
        raise DataFileError(f"{folder}: its masks have several sizes")
    inside = 255 * torch.stack([maps[i] for i in indices])[:, None].to(torch.uint8)
    return (inside if size is None else fit(inside, size, resize))[:, 0] > 127


def _named(paths: Iterable[Path]) -> dict[str, Path]:
    """Clips by their names."""
    short = [(path.name if path.is_dir() else path.stem, path) for path in paths]
    counts = Counter(name for name, _ in short)
    return {name if counts[name] == 1 else path.name: path for name, path in short}


class DAVIS(ClipFolder):
    """Clips of DAVIS 2016 or 2017, whose captions a user brings (the data set has none).

    Args:
        root: the folder that holds JPEGImages and ImageSets.
        split: clips of ImageSets/<year>/<split>.txt; None: all clips, or those with captions.
        year: of that list.
        resolution: 480p, or Full-Resolution.
        masks: also give the objects, from Annotations.
        **options: see `ClipFolder`.

    Raises:
        MissingDataError: see `ClipFolder`; also no such list.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str | None = None,
        year: int = 2017,
        resolution: str = "480p",
        masks: bool = False,
        **options: Any,
    ) -> None:
        base = data_root(root, what="DAVIS", layout=_DAVIS)
        if masks:
            options["masks"] = data_root(base / "Annotations" / resolution, what="DAVIS masks", layout=_DAVIS)
        frames = data_root(base / "JPEGImages" / resolution, what="DAVIS frames", layout=_DAVIS)
        if split is not None:
            path = data_root(
                base / "ImageSets" / str(year) / f"{split}.txt", what="DAVIS split", layout=_DAVIS, kind="file"
            )
            # The lists of 2016 name pictures (/JPEGImages/480p/bear/00000.jpg ...), those of 2017 clips.
            lines = [line.split()[0] for _, line in read_lines(path)]
            clips = [Path(line).parent.name if Path(line).suffix else line for line in lines]
            options["names"] = list(dict.fromkeys(clips))
        super().__init__(frames, **options)


def read_captions(path: str | os.PathLike) -> dict[str, str]:
    """Clip -> caption from a JSON object, or from lines `clip caption`.

    Raises:
        MissingDataError: no such file, or a line that is no such pair (with its number).
        core.data.DataFileError: not UTF-8, not JSON, or it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingDataError(f"there is no file of captions {str(path)!r}: JSON, or lines of 'clip caption'")
    if path.suffix.lower() == ".json":
        found = read_json(path, what="an object of clip and caption")
        if not all(isinstance(v, str) for v in found.values()):
            raise MissingDataError(f"{path}: a JSON object of clip and caption is expected")
        return found
    captions = {}
    for number, line in read_lines(path):
        parts = line.split(maxsplit=1)
        if len(parts) < 2:
            raise MissingDataError(f"{path}, line {number}: expected 'clip caption': {line[:200]!r}")
        captions[parts[0]] = parts[1]
    return captions
