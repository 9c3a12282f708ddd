"""Preparation tasks for image sets: ImageNet's archives into folders, folders into a zip archive or tar shards."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from core.checkpoint import write_text_atomic
from core.config.files import read_json, read_lines, reading, replacing
from core.data.prepare import preparer
from core.data.sources.files import IMAGE_EXTENSIONS, image_files, is_folder, listed
from core.errors import VitrineError
from core.output.progress import Progress


class PreparationError(VitrineError, ValueError):
    """Source files that are missing or not what they should be."""


@preparer("imagenet")
def imagenet(
    output: Path,
    train: Path | None = None,
    val: Path | None = None,
    devkit: Path | None = None,
) -> str:
    """ImageNet-1k's archives of image-net.org into one folder per class: output/train/<wnid>, output/val/<wnid>.

    A class that is complete is left alone, so a task that was stopped goes on with the next one.

    Args:
        output: the data set's root.
        train: ILSVRC2012_img_train.tar (138 GB), an archive of 1000 archives.
        val: ILSVRC2012_img_val.tar (6.3 GB); needs devkit.
        devkit: ILSVRC2012_devkit_t12.tar.gz, which tells the class of each validation image.

    Raises:
        PreparationError: an archive is missing or is another one.
    """
    if train is None and val is None:
        raise PreparationError("give train=ILSVRC2012_img_train.tar, or val=... and devkit=..., or all three")
    if val is not None and devkit is None:
        raise PreparationError("val= needs devkit=ILSVRC2012_devkit_t12.tar.gz, which holds the classes of its images")
    done = []
    if train is not None:
        done.append(f"train: {_unpack_train(_file(train), output / 'train')} classes")
    if val is not None:
        done.append(f"val: {_unpack_val(_file(val), _file(devkit), output / 'val')} images")
    return f"{output}: {', '.join(done)}"


def _unpack_train(archive: Path, output: Path) -> int:
    count = 0
    with _unpacking(archive), tarfile.open(archive) as outer:
        members = [m for m in outer.getmembers() if m.isfile()]
        if not members or any(not m.name.endswith(".tar") for m in members):
            raise PreparationError(
                f"'{archive}' is not the training archive: it should hold one n........tar per class"
            )
        for member in Progress().over(members, "train classes"):
            folder = output / Path(member.name).stem
            if not folder.exists():
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    _fill_folder(folder, ((m.name, inner.extractfile(m)) for m in inner if m.isfile()))
            count += 1
    return count


def _unpack_val(archive: Path, devkit: Path, output: Path) -> int:
    classes = _validation_classes(devkit)
    with _unpacking(archive), tarfile.open(archive) as images:
        members = sorted((m for m in images.getmembers() if m.isfile()), key=lambda m: m.name)
        if len(members) != len(classes):
            raise PreparationError(
                f"'{archive}' holds {len(members)} images, '{devkit}' the classes of {len(classes)}: "
                "they do not belong together"
            )
        by_class: dict[str, list[tarfile.TarInfo]] = {}
        for member, wnid in zip(members, classes, strict=True):
            by_class.setdefault(wnid, []).append(member)
        for wnid, own in Progress().over(by_class.items(), "val classes", total=len(by_class)):
            if not (output / wnid).exists():
                _fill_folder(output / wnid, ((m.name, images.extractfile(m)) for m in own))
    return len(members)


def _validation_classes(devkit: Path) -> list[str]:
    """The wnid of every validation image, in the order of their names."""
    from scipy.io import loadmat

    with _unpacking(devkit), tarfile.open(devkit) as kit:
        names = {Path(m.name).name: m for m in kit.getmembers() if m.isfile()}
        try:
            meta = loadmat(io.BytesIO(kit.extractfile(names["meta.mat"]).read()), squeeze_me=True)["synsets"]
            truth = kit.extractfile(names["ILSVRC2012_validation_ground_truth.txt"]).read().decode()
        except KeyError as error:
            raise PreparationError(f"'{devkit}' is not ImageNet's development kit: it holds no {error}") from None
    leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in meta if int(s["num_children"]) == 0}
    return [leaves[int(line)] for line in truth.split()]


def _fill_folder(folder: Path, files: Iterator[tuple[str, IO[bytes] | None]]) -> None:
    """A folder that is there with all its files or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, source in files:
        with source, open(temporary / Path(name).name, "wb") as target:  # only the last part: no way out of the folder
            shutil.copyfileobj(source, target, 1 << 20)
    os.replace(temporary, folder)


@preparer("image_zip")
def image_zip(root: Path, output: Path, splits: list[str] | None = None) -> str:
    """One folder per class into archives output/<split>.zip with lists <split>_map.txt, for slow or shared disks.

    Images are stored as they are. `core.data.ImageZip` and ``core.data.ImageNet(storage=zip)`` read the result. A split
    whose list is there is complete and left alone.

    Args:
        root: folder with root/<split>/<class>/<image>.
        output: where the archives go; may be root.
        splits: which splits; all folders of root when null.

    Raises:
        PreparationError: no such folder, or no images in it.
    """
    done = []
    for split in splits or _folders(root):
        listing = output / f"{split}_map.txt"
        if not listing.exists():
            _write_zip(root / split, output / f"{split}.zip", listing)
        done.append(f"{split}: {len(read_lines(listing))} images")
    return f"{output}: {', '.join(done)}"


def _write_zip(root: Path, archive: Path, listing: Path) -> None:
    files = _labelled_images(root)
    with replacing(archive) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
        for path, _ in Progress().over(files, archive.name):
            target.write(path, path.relative_to(root).as_posix())
    lines = "".join(f"{path.relative_to(root).as_posix()}\t{label}\n" for path, label in files)
    write_text_atomic(lines, listing)


@preparer("image_shards")
def image_shards(root: Path, output: Path, split: str = "train", per_shard: int = 10000, seed: int = 0) -> str:
    """One folder per class into tar shards output/<split>-000000.tar, ... in the webdataset layout, shuffled once.

    A sample has its image as it is, its class index (cls) and its path (txt). `core.data.TarShards` and
    ``core.data.ImageNet(storage=shards)`` read the result. Shards that are there are complete and left alone.

    Args:
        root: folder with root/<split>/<class>/<image>.
        output: where the shards go.
        split: which split.
        per_shard: images per shard.
        seed: of the order, so that neighbours in a shard are of different classes.

    Raises:
        PreparationError: no such folder, no images in it, or shards there that were made with other settings.
    """
    import random

    if per_shard < 1:
        raise PreparationError(f"per_shard={per_shard}: at least one image")
    files = _labelled_images(root / split)
    random.Random(seed).shuffle(files)
    output.mkdir(parents=True, exist_ok=True)
    settings = {"images": len(files), "per_shard": per_shard, "seed": seed}
    _check_settings(output / f"{split}-settings.json", settings)
    starts = range(0, len(files), per_shard)
    for number, start in enumerate(Progress().over(starts, f"{split} shards")):
        path = output / f"{split}-{number:06d}.tar"
        if not path.exists():
            _write_shard(path, root / split, files[start : start + per_shard], start)
    return f"{output}: {len(files)} images in {len(starts)} shards"


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Shards of two different orders would hold some images twice and others never."""
    if path.exists():
        found = read_json(path)
        if found != settings:
            raise PreparationError(
                f"'{path}' says that the shards were made with {found}: remove them, or use the same"
            )
    else:
        write_text_atomic(json.dumps(settings) + "\n", path)


def _write_shard(path: Path, root: Path, files: list[tuple[Path, int]], first: int) -> None:
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as target:
        for number, (image, label) in enumerate(files, start=first):
            parts = {
                image.suffix.lower(): image.read_bytes(),
                ".cls": str(label).encode(),
                ".txt": image.relative_to(root).as_posix().encode(),
            }
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:08d}{suffix}")
                member.size = len(data)
                target.addfile(member, io.BytesIO(data))


def _labelled_images(root: Path) -> list[tuple[Path, int]]:
    """(image, class index by sorted folder name) in the order of the names."""
    found = [
        (path, label)
        for label, name in enumerate(_folders(root))
        for path in sorted(root / name / file for file in image_files(root / name, deep=True))
    ]
    if not found:
        known = ", ".join(IMAGE_EXTENSIONS)
        raise PreparationError(f"'{root}' holds no images: one folder per class is expected, with {known}")
    return found


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise PreparationError(f"there is no folder '{root}'")
    return [entry.name for entry in listed(root) if is_folder(entry)]


def _unpacking(archive: Path) -> AbstractContextManager[None]:
    return reading(archive, "It should be the archive as it was published: copy or download it again.")


def _file(path: Path) -> Path:
    if not path.is_file():
        raise PreparationError(f"there is no file '{path}'")
    return path
