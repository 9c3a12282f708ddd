"""Small files in the very formats that petl's data sets are published in."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int = 0, height: int = 20, width: int = 30) -> np.ndarray:
    """Coarse random colours, which JPEG changes and resizing does not make flat."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, seed: int = 0, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width)).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---------------------------------------------------------------------- VTAB-1k, NOAH's layout
SPLITS = {"train800": [0, 1, 2, 0], "val200": [1, 3], "test": [0, 1, 2, 3, 3]}


def vtab(root: Path, task: str = "kitti", suffix: str = ".jpg", splits: dict[str, list[int]] | None = None) -> Path:
    """The folder of all tasks; train800val200 has copies of its own, as NOAH's script writes it."""
    splits = dict(splits or SPLITS)
    splits["train800val200"] = splits["train800"] + splits["val200"]
    for split, labels in splits.items():
        lines = []
        for place, label in enumerate(labels):
            name = f"images/{split}/{place:06d}{suffix}"
            save(root / task / name, seed=10 * label + place)
            lines.append(f"{name} {label}\n")
        write(root / task / f"{split}.txt", "".join(lines))
    return root


# ---------------------------------------------------------------------- FGVC, few-shot, domain generalisation
def fgvc(root: Path, task: str = "cub", images: str = "images", val: bool = True, first: int = 1) -> Path:
    """Three classes, counted from `first`."""
    parts = {"train": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], "val": [0, 1], "test": [2, 1, 0]}
    for split, labels in parts.items():
        if split == "val" and not val:
            continue
        listed = {}
        for place, label in enumerate(labels):
            name = f"{label + first:03d}.Bird/{split}_{place}.jpg"
            save(root / task / images / name, seed=label)
            listed[name] = label + first
        write(root / task / f"{split}.json", json.dumps(listed))
    return root


def few_shot(root: Path, task: str = "food101", images: str = "images", shots: int = 2, seed: int = 0) -> Path:
    lists = root / task / "annotations"
    for split, name in (("train", f"train_meta.list.num_shot_{shots}.seed_{seed}"), ("val", "val_meta.list"),
                        ("test", "test_meta.list")):  # fmt: skip
        lines = []
        for label in range(3):
            for place in range(shots):
                file = f"apple pie {label}/{split} {place}.jpg"  # names with blanks
                save(root / task / images / file, seed=label)
                lines.append(f"{file} {label}\n")
        write(lists / name, "".join(lines))
    return root


def domain(root: Path, lists: bool = True) -> Path:
    """ImageNet and its variants with images of two classes that all of them have, 6 (n01498041) and 11 (n01531178)."""
    wnids = {6: "n01498041", 11: "n01531178"}
    places = {
        "imagenet": "val/{wnid}", "imagenetv2": "imagenetv2-matched-frequency-format-val/{number}",
        "imagenet-sketch": "images/{wnid}", "imagenet-adversarial": "imagenet-a/{wnid}",
        "imagenet-rendition": "imagenet-r/{wnid}",
    }  # fmt: skip
    for folder, place in places.items():
        lines = []
        for number, wnid in wnids.items():
            file = f"{place.format(wnid=wnid, number=number)}/0.1_golf cart _ golf cart.jpg"
            save(root / folder / file, seed=number)
            lines.append(f"{file.removeprefix('val/')} {number}\n")
        if lists:
            write(root / folder / "annotations/val_meta.list", "".join(lines))
    lines = []
    for number, wnid in wnids.items():
        file = f"{wnid}/{wnid}_1.JPEG"
        save(root / "imagenet/train" / file, seed=number)
        lines.append(f"{file} {number}\n")
    write(root / "imagenet/annotations/train_meta.list.num_shot_1.seed_0", "".join(lines))
    return root


# ---------------------------------------------------------------------- published data sets behind VTAB-1k
def cifar(root: Path, count: int = 3) -> dict[str, str]:
    """CIFAR-100's pickles; returns their MD5 sums, which torchvision asks for."""
    import hashlib

    folder, sums = root / "cifar-100-python", {}
    folder.mkdir(parents=True)
    for place, split in enumerate(("train", "test")):
        data = np.stack([pixels(10 * place + i, 32, 32).transpose(2, 0, 1).reshape(-1) for i in range(count)])
        content = {"data": data, "fine_labels": [place * count + i for i in range(count)]}
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    for file in ("train", "test", "meta"):
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    return sums


def class_folders(root: Path, names: list[str], count: int = 2) -> Path:
    for label, name in enumerate(names):
        for place in range(count):
            save(root / name / f"image_{place + 1:04d}.jpg", seed=10 * label + place)
    return root


def dtd(root: Path) -> Path:
    for split, names in (("train", "banded blotchy"), ("val", "banded"), ("test", "blotchy")):
        files = [f"{name}/{name}_{split}.jpg" for name in names.split()]
        for file in files:
            save(root / "dtd/dtd/images" / file)
        write(root / f"dtd/dtd/labels/{split}1.txt", "".join(f"{file}\n" for file in files))
    return root


def pets(root: Path) -> Path:
    for split, lines in (("trainval", "Abyssinian_1 1 1 1\nbeagle_7 2 2 1\n"), ("test", "beagle_9 2 2 1\n")):
        write(root / f"oxford-iiit-pet/annotations/{split}.txt", lines)
        for line in lines.splitlines():
            save(root / f"oxford-iiit-pet/images/{line.split()[0]}.jpg")
    return root


def clevr(root: Path) -> Path:
    for split, depths in (("train", [[9.7, 8.2, 12.0], [11.0, 10.5, 10.1, 10.2]]), ("val", [[7.5, 9.0, 9.1]])):
        scenes = []
        for place, own in enumerate(depths):
            file = f"CLEVR_{split}_{place:06d}.png"
            save(root / "CLEVR_v1.0/images" / split / file, seed=place)
            scenes.append({"image_filename": file, "objects": [{"pixel_coords": [1, 2, depth]} for depth in own]})
        write(root / f"CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json", json.dumps({"info": {}, "scenes": scenes}))
    return root


def kitti(root: Path) -> Path:
    line = "{} 0.00 0 -0.20 712.40 143.00 810.73 307.92 1.89 0.48 1.20 1.84 1.47 {} 0.01\n"
    labels = ("Pedestrian 3.0", "Car 7.9|Van 30.0", "Truck 20.5|DontCare -1000", "Cyclist 4.0|Car 12.0")
    for place, things in enumerate(labels):
        save(root / f"training/image_2/{place:06d}.png", seed=place)
        text = "".join(line.format(*thing.split()) for thing in things.split("|"))
        write(root / f"training/label_2/{place:06d}.txt", text)
    return root


def dsprites(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    images = np.zeros((4, 64, 64), dtype=np.uint8)
    images[:, :32] = 1
    latents = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 39, 31, 2], [0, 2, 5, 2, 1, 9], [0, 0, 1, 3, 2, 31]])
    np.savez_compressed(
        root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", imgs=images, latents_classes=latents,
        metadata=np.array({"author": "pickled, as published"}, dtype=object),
    )  # fmt: skip
    return root


def norb_matrix(array: np.ndarray) -> bytes:
    """smallNORB's own format: magic, axes, at least three sizes, values."""
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[str(array.dtype)]
    sizes = [*array.shape, *[1] * (3 - array.ndim)]
    return struct.pack(f"<ii{len(sizes)}i", magic, array.ndim, *sizes) + array.tobytes()


def smallnorb(root: Path, packed: bool = False) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for stem, count in (
        ("smallnorb-5x46789x9x18x6x2x96x96-training", 3),
        ("smallnorb-5x01235x9x18x6x2x96x96-testing", 2),
    ):
        images = np.stack([np.full((2, 96, 96), [[[40 * i]], [[250]]], dtype=np.uint8) for i in range(count)])
        info = np.array([[0, i % 9, 2 * i + 30 * (count == 2), 0] for i in range(count)], dtype=np.int32)
        for kind, array in (("dat", images), ("info", info)):
            data = norb_matrix(array)
            (root / f"{stem}-{kind}.mat{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
    return root
