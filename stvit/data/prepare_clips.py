"""The preparation task that writes MovingGlyphs as video files with list files, as Kinetics is stored."""

from __future__ import annotations

import json
import os
from pathlib import Path

from core.config.files import read_json, replacing
from core.data.prepare import preparer
from core.errors import ConfigError
from core.output.media import write_media
from core.output.progress import Progress
from stvit.standin.moving_glyphs import class_names, sample_clip, sample_label


@preparer("moving_glyphs")
def moving_glyphs(
    root: Path,
    train: int = 2048,
    val: int = 512,
    size: int = 56,
    frames: int = 24,
    shapes: int = 4,
    fps: float = 12.0,
    seed: int = 0,
) -> str:
    """Small videos of moving shapes with list files, for trying video recognition within minutes.

    root/{train,val}/<class>/<number>.mp4 and root/{train,val}.txt with a line `path label` for each, root/classes.txt.
    A video is a function of seed, split and its number alone. Files that are there already with the same settings are
    left alone, so that the task goes on after an interruption.

    Args:
        root: folder that is written to.
        train: videos for training.
        val: videos for testing.
        size: side of the frames in pixels.
        frames: frames of a video.
        shapes: number of shapes; there are four times as many classes.
        fps: frames per second.
        seed: of all videos.

    Raises:
        ConfigError: a number below 1, or a root that was written with other settings.
    """
    if min(train, val, size, frames) < 1:
        raise ConfigError("moving_glyphs: train, val, size and frames are at least 1")
    settings = {"size": size, "frames": frames, "shapes": shapes, "fps": fps, "seed": seed}
    note = root / "moving_glyphs.json"
    if note.is_file() and (found := read_json(note)) != settings:
        raise ConfigError(f"{note} says that {root} was written with {found}: give an empty root=")
    if not note.is_file() and any(root.glob("*")):
        raise ConfigError(f"{root} holds other files: give an empty root=")
    _write(note, json.dumps(settings))
    names = [name.replace(" ", "_") for name in class_names(shapes)]
    lines = []
    for split, count in (("train", train), ("val", val)):
        entries = []
        for index in Progress().over(range(count), f"{split} videos"):
            label = sample_label(split, seed, index, shapes)
            path = Path(split) / names[label] / f"{index:06d}.mp4"
            entries.append(f"{path.as_posix()} {label}\n")
            if not (root / path).is_file():
                clip, _ = sample_clip(split, seed, index, size=size, frames=frames, shapes=shapes)
                # Under another name first, so that what has the name is whole.
                made = write_media(clip, (root / path).with_name(f".{index:06d}.part"), fps=fps, video="mp4")
                os.replace(made, root / path)
        _write(root / f"{split}.txt", "".join(entries))
        lines.append(f"{root / f'{split}.txt'}: {count} videos of {len(names)} classes")
    _write(root / "classes.txt", "".join(f"{name}\n" for name in names))
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
