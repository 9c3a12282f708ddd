"""Preparation tasks of slot_walks: MOVi's records, SBD's labels, drawn scenes in real layouts, a ViT for digits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config.files import read_json, replacing
from core.data import DataFileError, MissingDataError, load_image, load_labels
from core.data.prepare import preparer
from core.errors import ConfigError
from core.output.progress import Progress
from slot_walks.data.files import load_mat, read_lines
from slot_walks.data.tfrecord import parse_example, read_records
from slot_walks.standin.blobworld import CATEGORIES, Scene, draw_scene, scene_seed

__all__ = ["blobworld", "blobworld_fe", "digit_vit", "movi", "voc_trainaug"]


@preparer("movi")
def movi(source: Path, output: Path, level: str = "C", splits: list[str] | None = None, quality: int = 95) -> str:
    """MOVi's TFRecord files, as TFDS publishes them, into the folders of frames that `slot_walks.data.MOVi` reads.

    output/<level>/<split>/rgb/<clip>/<frame>.jpg and seg/<clip>/<frame>.png. A clip that is there is left alone, so the
    task goes on after an interruption. TensorFlow is not needed.

    Args:
        source: folder of `*-train.tfrecord-*` and `*-validation.tfrecord-*` files (movi_c/256x256/1.0.0).
        output: root of the data set.
        level: C or E; name of the folder below output.
        splits: train, validation; both when null.
        quality: of the JPEG files.

    Raises:
        MissingDataError: no such files.
        DataFileError: records that are no clips of MOVi; names file and number.
    """
    lines = []
    for split in splits or ["train", "validation"]:
        shards = sorted(source.glob(f"*-{split}.tfrecord-*"))
        if not shards:
            raise MissingDataError(
                f"there is no file *-{split}.tfrecord-* in {str(source)!r}: copy gs://kubric-public/tfds/movi_"
                f"{level.lower()}/256x256/1.0.0 there and give it as source="
            )
        clips = frames = 0
        for shard in Progress().over(shards, f"{split} files"):
            for number, record in enumerate(read_records(shard)):
                frames += _write_clip(record, output / level / split, f"{clips:05d}", f"{shard}, {number}", quality)
                clips += 1
        lines.append(f"{output / level / split}: {clips} clips, {frames} frames")
    return "\n".join(lines)


def _write_clip(record: bytes, folder: Path, clip: str, place: str, quality: int) -> int:
    """Writes the frames of a record, unless they are there, and returns their number."""
    done = folder / "rgb" / clip
    if done.is_dir():
        return sum(1 for _ in done.iterdir())
    try:
        features = parse_example(record)
        pictures, labels = features["video"], features["segmentations"]
        if len(pictures) != len(labels) or not pictures:
            raise ValueError(f"{len(pictures)} frames and {len(labels)} segmentations")
    except (ValueError, KeyError) as error:
        raise DataFileError(f"record {place}: no clip of MOVi ({error}); copy the file again") from error
    for kind in ("seg", "rgb"):  # pictures last: their folder says that a clip is whole
        part = folder / kind / f".{clip}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for frame, encoded in enumerate(pictures if kind == "rgb" else labels):
            name = f"record {place}: frame {frame} of {kind}"
            if kind == "rgb":
                picture = load_image(encoded, name=name)
                picture.save(part / f"{frame:05d}.jpg", quality=quality, subsampling=0)
            else:
                load_labels(encoded, name)
                (part / f"{frame:05d}.png").write_bytes(encoded)
        shutil.rmtree(folder / kind / clip, ignore_errors=True)
        os.replace(part, folder / kind / clip)
    return len(pictures)


@preparer("voc_trainaug")
def voc_trainaug(voc: Path, sbd: Path) -> str:
    """The 10,582 training pictures with class labels of VOC 2012 and SBD: SegmentationClassAug and trainaug.txt.

    The list is what SBD labels and VOC trains on, without VOC's validation pictures. VOC's labels are taken where it
    has them. Files that are there are left alone.

    Args:
        voc: VOCdevkit/VOC2012.
        sbd: folder `dataset` of SBD's benchmark_RELEASE, with cls/*.mat, train.txt and val.txt.

    Raises:
        MissingDataError: a list or a label file is missing.
    """
    lists = voc / "ImageSets" / "Segmentation"
    trained, held_out = (set(read_lines(lists / f"{split}.txt", "VOC")) for split in ("train", "val"))
    labelled = {name for split in ("train", "val") for name in read_lines(sbd / f"{split}.txt", "SBD")}
    names = sorted((labelled | trained) - held_out)
    folder = voc / "SegmentationClassAug"
    folder.mkdir(exist_ok=True)
    for name in Progress().over(names, "labels"):
        target = folder / f"{name}.png"
        if target.is_file():
            continue
        own = voc / "SegmentationClass" / f"{name}.png"
        with replacing(target) as file:
            if own.is_file():
                file.write(own.read_bytes())
            else:
                _palette_picture(_sbd_labels(sbd / "cls" / f"{name}.mat")).save(file, format="png")
    _write_text(lists / "trainaug.txt", "".join(f"{name}\n" for name in names))
    return f"{lists / 'trainaug.txt'}: {len(names)} pictures"


def _sbd_labels(path: Path) -> np.ndarray:
    variables = load_mat(path, "SBD (sbd= is the folder that holds cls/ and train.txt)")
    try:
        return np.asarray(variables["GTcls"]["Segmentation"][0, 0], dtype=np.uint8)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise DataFileError(f"{path} does not hold SBD's labels (GTcls.Segmentation): download it again") from error


@preparer("blobworld")
def blobworld(
    root: Path, train: int = 500, val: int = 80, size: int = 64, most: int = 4, repeat: bool = False, seed: int = 0
) -> str:
    """Drawn scenes with instances and classes in the layout of VOC 2012, for trying object discovery within minutes.

    A scene is a function of seed, split and number. What is there with the same settings is left alone.

    Args:
        root: folder that is written to; VOC2012 lies below it.
        train: scenes for training (train.txt and trainaug.txt).
        val: scenes for evaluation (val.txt).
        size: side of the pictures in pixels.
        most: largest number of objects; the smallest is 2.
        repeat: a category may occur twice in a scene.
        seed: of all scenes.

    Raises:
        ConfigError: numbers that make no scene, or a root that holds something else.
    """
    settings = {"train": train, "val": val, "size": size, "most": most, "repeat": repeat, "seed": seed}
    if min(train, val) < 1 or size < 16 or most < 2 or (most > CATEGORIES and not repeat):
        raise ConfigError(f"blobworld: {settings}: at least one scene each, 16 pixels, 2 to {CATEGORIES} objects")
    _claim(root, "blobworld.json", settings)
    base = root / "VOC2012"
    counts = {"train": train, "val": val}
    for split, name, index in _numbered(counts):
        files = [base / f"JPEGImages/{name}.jpg"]
        files += [base / f"Segmentation{kind}/{name}.png" for kind in ("Class", "Object")]
        if all(file.is_file() for file in files):
            continue
        scene = draw_scene(scene_seed(split, seed, index), size, (2, most), repeat=repeat)
        for file, picture in zip(files, _pictures(scene), strict=True):
            _save(picture, file)
    lists = base / "ImageSets" / "Segmentation"
    names = {split: "".join(f"{n}\n" for s, n, _ in _numbered(counts) if s == split) for split in counts}
    for name, split in (("train", "train"), ("trainaug", "train"), ("val", "val")):
        _write_text(lists / f"{name}.txt", names[split])
    # The list of that name takes its labels from here.
    for name in names["train"].split():
        target = base / "SegmentationClassAug" / f"{name}.png"
        if not target.is_file():
            with replacing(target) as file:
                file.write((base / "SegmentationClass" / f"{name}.png").read_bytes())
    return f"{base}: {train} + {val} scenes"


@preparer("blobworld_fe")
def blobworld_fe(root: Path, train: int = 500, val: int = 80, test: int = 80, size: int = 64, seed: int = 0) -> str:
    """Drawn scenes of one object with its foreground in the layout of Birds, for trying foreground extraction.

    Args:
        root: folder that is written to.
        train: scenes for training.
        val: scenes for validation.
        test: scenes for testing.
        size: side of the pictures in pixels.
        seed: of all scenes.

    Raises:
        ConfigError: numbers that make no scene, or a root that holds something else.
    """
    counts = {"train": train, "val": val, "test": test}
    settings = counts | {"size": size, "seed": seed}
    if min(counts.values()) < 1 or size < 16:
        raise ConfigError(f"blobworld_fe: {settings}: at least one scene each and 16 pixels")
    _claim(root, "blobworld_fe.json", settings)
    lists: dict[str, list[str]] = {"images": [], "bounding_boxes": [], "train_val_test_split": []}
    for number, (split, name, index) in enumerate(_numbered(counts), start=1):
        scene = draw_scene(scene_seed(split, seed, index), size, foreground=True)
        image, _, instances = _pictures(scene)
        _save(image, root / "images" / "001.Blob" / f"{name}.jpg")
        mask = Image.fromarray((255 * (np.asarray(instances) > 0)).astype(np.uint8))
        _save(mask, root / "segmentations" / "001.Blob" / f"{name}.png")
        rows, columns = (np.flatnonzero((scene.instances > 0).any(axis=axis)) for axis in (1, 0))
        box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        lists["images"].append(f"{number} 001.Blob/{name}.jpg")
        lists["bounding_boxes"].append(f"{number} " + " ".join(f"{float(v):.1f}" for v in box))
        lists["train_val_test_split"].append(f"{number} {list(counts).index(split)}")
    for name, lines in lists.items():
        _write_text(root / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    return f"{root}: {train} + {val} + {test} scenes"


@preparer("digit_vit")
def digit_vit(
    output: Path, steps: int = 1500, scenes: int = 2000, batch: int = 16, mask_ratio: float = 0.6, seed: int = 100
) -> str:
    """A small ViT that learns from digit scenes without labels: the backbone of slot_walks/digits_vit, vit.pt.

    A masked autoencoder; about five minutes of a CPU core. What is there with the same settings is left alone.

    Args:
        output: folder that is written to.
        steps: training steps.
        scenes: training scenes, of which no label is read.
        batch: scenes in a step.
        mask_ratio: share of the patches that are masked.
        seed: of scenes and weights; the claims' seeds are others.

    Raises:
        ConfigError: numbers that make no model, or a folder that holds something else.
    """
    from slot_walks.standin.pretraining import build

    settings = {"steps": steps, "scenes": scenes, "batch": batch, "mask_ratio": mask_ratio, "seed": seed}
    if min(steps, scenes, batch) < 1 or not 0.05 <= mask_ratio <= 0.95:
        raise ConfigError(f"digit_vit: {settings}: at least one step, scene and sample, mask_ratio from 0.05 to 0.95")
    checks = build(output, settings)
    return "\n".join([f"{output / 'vit.pt'}", *(f"  {name:<14} {value:.4g}" for name, value in checks.items())])


def _numbered(counts: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    """Split, file name and number of every scene."""
    for split, count in counts.items():
        for index in range(count):
            yield split, f"{split}_{index:06d}", index


def _pictures(scene: Scene) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Picture, classes and instances as files hold them."""
    pixels = np.round(255 * scene.image).astype(np.uint8)
    return Image.fromarray(pixels), _palette_picture(scene.categories), _palette_picture(scene.instances)


def _palette_picture(labels: np.ndarray) -> Image.Image:
    """Labels as a picture with a palette, as VOC stores them."""
    picture = Image.fromarray(labels.astype(np.uint8)).convert("P")
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    picture.putpalette(palette.flatten().tolist())
    return picture


def _save(picture: Image.Image, path: Path) -> None:
    options = {"format": "jpeg", "quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {"format": "png"}
    with replacing(path) as file:
        picture.save(file, **options)


def _claim(root: Path, name: str, settings: dict[str, Any]) -> None:
    """Notes in a root with what it is written; an error where it holds something else."""
    note = root / name
    if note.is_file() and (found := read_json(note)) != settings:
        raise ConfigError(f"{note} says that {root} was written with {found}: give an empty root=")
    if not note.is_file() and root.is_dir() and any(root.iterdir()):
        raise ConfigError(f"{root} holds other files: give an empty root=")
    _write_text(note, json.dumps(settings))


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
