"""LOVEU-TGVE-2023: 76 clips with four edits each, and the layout in which edited clips are handed in."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.config.files import read_text, reading, replacing
from core.data import MissingDataError, data_root, derive_seed
from core.errors import ConfigError, nearest
from tune_a_video.data.frames import Pad, Resize, as_size, check_multiple, clip_indices, open_frames, to_float
from tune_a_video.data.one_shot import read_sized

KINDS = ("style", "object", "background", "multiple")
GROUPS = ("DAVIS_480p", "youtube_480p", "videvo_480p")
_TABLE = "LOVEU-TGVE-2023_Dataset.csv"
_NAME, _CAPTION = "Video name", "Our GT caption"
_EDITS = dict(
    zip(
        KINDS,
        (
            "Style Change Caption",
            "Object Change Caption",
            "Background Change Caption",
            "Multiple Changes Caption",
        ),
        strict=True,
    )
)
_LAYOUT = f"""\
root/{_TABLE}        (or beside root)
root/{{{",".join(GROUPS)}}}/480p_frames/<clip>/00000.jpg ..."""


class TGVEClip(NamedTuple):
    """A row of the table.

    group    folder of its source, of `GROUPS`
    name     of the clip
    caption  of the source
    edits    kind (of `KINDS`) -> prompt; a kind without a prompt is absent
    frames   folder of its frames
    """

    group: str
    name: str
    caption: str
    edits: dict[str, str]
    frames: Path


class LoveuTGVE(Dataset):
    """The benchmark: `video` (f, 3, H, W) float32 in [-1, 1], `caption`, `edits` (kind -> prompt), `sample_id`.

    Args:
        root: the unpacked `loveu-tgve-2023`.
        n_frames: f; None: all frames of each clip (32 or 128).
        start: first frame; None: for clips with more frames than wanted, a place drawn once per clip, as the
            benchmark's own code does.
        stride: distance of two frames.
        size: None: as the frames are, 480 x 480.
        resize, pad, multiple: see `tune_a_video.data.OneShotVideoDataset`.
        seed: of the places.
        clip: only this one: its row in the table from 0, its name, or `GROUP/NAME`. None: all.

    Raises:
        MissingDataError: no such folder or table, a missing column, a clip without frames; each names it.
        ConfigError: there is no such clip, or several have that name.
    """

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        n_frames: int | None = 32,
        start: int | None = 0,
        stride: int = 1,
        size: int | tuple[int, int] | None = None,
        resize: Resize = "stretch",
        pad: Pad = "none",
        multiple: int = 8,
        seed: int = 0,
        clip: str | int | None = None,
    ) -> None:
        self.root = data_root(root, what="LOVEU-TGVE-2023", layout=_LAYOUT)
        self.clips = read_table(self.root)
        self._first = 0
        if clip is not None:
            self._first = _row_of(self.clips, clip)
            self.clips = [self.clips[self._first]]
        self.n_frames, self.start, self.stride, self.seed = n_frames, start, stride, seed
        self.size, self.resize, self.pad, self.multiple = as_size(size), resize, pad, multiple
        if self.size is not None:
            check_multiple(*self.size, multiple, "size")

    def __len__(self) -> int:
        return len(self.clips)

    def describe(self, index: int) -> str:
        """The clip's folder."""
        return str(self.clips[index].frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.clips[index]
        clip = open_frames(row.frames)
        start = self._place(index, clip.count) if self.start is None else self.start
        indices = clip_indices(clip.count, self.n_frames, start, self.stride, self.pad, str(row.frames))
        frames = read_sized(clip, indices, self.size, self.resize, self.multiple)
        return {
            "video": to_float(frames),
            "caption": row.caption,
            "edits": dict(row.edits),
            "sample_id": f"{row.group}/{row.name}",
        }

    def _place(self, index: int, count: int) -> int:
        room = 0 if self.n_frames is None else count - (self.n_frames - 1) * self.stride
        return derive_seed(self.seed, self._first + index) % room if room > 1 else 0


def _row_of(clips: list[TGVEClip], wanted: str | int) -> int:
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 0 <= wanted < len(clips):
            raise ConfigError(f"clip={wanted}: the table has the clips 0 to {len(clips) - 1}")
        return wanted
    names = [f"{row.group}/{row.name}" for row in clips]
    found = [i for i, (name, row) in enumerate(zip(names, clips, strict=True)) if wanted in (name, row.name)]
    if not found:
        raise ConfigError(f"clip={wanted}: the table has no such clip{nearest(str(wanted), [c.name for c in clips])}")
    if len(found) > 1:
        raise ConfigError(f"clip={wanted} is the name of several clips: use {', '.join(names[i] for i in found)}")
    return found[0]


def read_table(root: Path) -> list[TGVEClip]:
    """The clips of the benchmark's table, in its order.

    Between the groups the table has rows with a heading and no caption; a row counts when it has a name and a caption.

    Raises:
        MissingDataError: see `LoveuTGVE`.
    """
    beside = root.parent / _TABLE
    path = beside if beside.is_file() else root / _TABLE
    path = data_root(path, what="table of LOVEU-TGVE-2023", layout=_LAYOUT, kind="file")
    with reading(path, "It should be the benchmark's table as CSV: copy or download it again."):
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        columns = {(name or "").strip(): name for name in reader.fieldnames or []}
        missing = [name for name in (_NAME, _CAPTION, *_EDITS.values()) if name not in columns]
        if missing:
            raise MissingDataError(
                f"{path} has no column {missing[0]!r} (there are {', '.join(filter(None, columns))})"
            )
        rows = [{key: (row[name] or "").strip() for key, name in columns.items()} for row in reader]
    clips = []
    for row in rows:
        if not row[_NAME] or not row[_CAPTION]:
            continue
        places = [root / group / "480p_frames" / row[_NAME] for group in GROUPS]
        found = [place for place in places if place.is_dir()]
        if not found:
            raise MissingDataError(
                f"clip {row[_NAME]!r} of {path} has no frames; expected one of\n" + "\n".join(map(str, places))
            )
        edits = {kind: row[column] for kind, column in _EDITS.items() if row[column]}
        clips.append(TGVEClip(found[0].parents[1].name, row[_NAME], row[_CAPTION], edits, found[0]))
    if not clips:
        raise MissingDataError(f"{path} has no row with a name and a caption")
    return clips


class Submission:
    """Edited clips as the benchmark takes them: `<root>/<team>/<group>/<clip>/<kind>/00000.jpg`, ...

    Args:
        root: folder that is written to.
        team: name of the team.
        quality: of the JPEG files.
    """

    def __init__(self, root: str | os.PathLike, team: str, quality: int = 95) -> None:
        if not team or Path(team).name != team:
            raise ValueError(f"team={team!r} has to be the name of a folder")
        self.folder, self.quality = Path(root) / team, quality

    def place(self, clip: TGVEClip, kind: str) -> Path:
        """The folder of an edit.

        Raises:
            ValueError: no such kind of edit.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: {', '.join(KINDS)}")
        return self.folder / clip.group / clip.name / kind

    def write(self, clip: TGVEClip, kind: str, video: Tensor | np.ndarray) -> Path:
        """Writes an edit.

        Args:
            clip: of the data set.
            kind: of `KINDS`.
            video: (3, f, H, W) in [0, 1], as the pipeline returns it, or uint8 (f, H, W, 3).

        Returns:
            Its folder.

        Raises:
            ValueError: another shape or kind.
        """
        if isinstance(video, Tensor) and video.is_floating_point():
            if video.ndim != 4 or video.shape[0] != 3:
                raise ValueError(f"video is {tuple(video.shape)}: (3, f, H, W) is expected")
            video = (255 * video.detach().float().cpu().clamp(0, 1)).round().byte().permute(1, 2, 3, 0)
        pixels = np.asarray(video)
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"video is {pixels.shape} {pixels.dtype}: uint8 (f, H, W, 3) is expected")
        folder = self.place(clip, kind)
        for number, frame in enumerate(pixels):
            with replacing(folder / f"{number:05d}.jpg") as file:
                Image.fromarray(frame).save(file, format="jpeg", quality=self.quality, subsampling=0)
        for stale in folder.glob("*.jpg"):
            if not stale.stem.isdigit() or int(stale.stem) >= len(pixels):
                stale.unlink()
        return folder

    def missing(self, clips: list[TGVEClip], frames: int | None = None) -> Iterator[tuple[TGVEClip, str]]:
        """Edits that are not written yet, or not with that many frames."""
        for clip in clips:
            for kind in clip.edits:
                written = len(list(self.place(clip, kind).glob("*.jpg")))
                if not written or (frames is not None and written != frames):
                    yield clip, kind
