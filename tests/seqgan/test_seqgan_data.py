"""Readers of FFHQ and LSUN in the formats they are published in; transforms.

`files/church_outdoor_val_lmdb/data.mdb` was written by LMDB's own library (0.9.24): five pictures, WebP and JPEG, one
of them on pages of its own.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import ImageNet, MissingDataError
from seqgan.data import FFHQ, LSUN, LMDBError, LMDBReader, TokenizerTransform

FILES = Path(__file__).parent / "files"
SMALL = TokenizerTransform(16, "centre", flip=0.0)


def picture(seed: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def faces(root: Path, count: int, thousand: int = 10) -> Path:
    for number in range(count):
        folder = root / f"{number // thousand * thousand:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number:05d}.png")
    return root


# ------------------------------------------------------------------ FFHQ
def test_ffhq_reads_folders_of_a_thousand_split_by_number(tmp_path) -> None:
    root = faces(tmp_path, 25)
    train, val = (FFHQ(root, split, SMALL, val_count=5, count=25) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 5)
    assert train[12]["sample_id"] == "00010/00012.png" and val[0]["sample_id"] == "00020/00020.png"
    assert torch.equal(train[12]["image"], SMALL(picture(12)))
    assert len(FFHQ(root, "all", SMALL, count=25)) == 25
    assert train.describe(12).endswith("00010/00012.png")


def test_ffhq_reads_lists_and_one_folder(tmp_path) -> None:
    for number in range(4):
        picture(number).save(tmp_path / f"{number:05d}.png")
    listed = tmp_path / "ffhqvalidation.txt"
    listed.write_text("00003.png\n00001.png\n\n")
    data = FFHQ(tmp_path, "val", SMALL, list_file=listed, count=None)
    assert [data[i]["sample_id"] for i in range(2)] == ["00003.png", "00001.png"] and len(data) == 2
    listed.write_text("00003.png\n00009.png\n")
    with pytest.raises(MissingDataError, match=r"ffhqvalidation.txt: 1 pictures.*00009"):
        FFHQ(tmp_path, "val", list_file=listed, count=None)
    with pytest.raises(MissingDataError, match=r"no list .*dataset.list_file"):
        FFHQ(tmp_path, "val", list_file=tmp_path / "none.txt", count=None)


def test_ffhq_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(MissingDataError, match=r"dataset.root[\s\S]*00000/00000.png"):
        FFHQ(None)
    with pytest.raises(MissingDataError, match=r"no picture below"):
        FFHQ(tmp_path)
    faces(tmp_path, 3)
    with pytest.raises(MissingDataError, match=r"3 pictures .* instead of 70000.*count=null"):
        FFHQ(tmp_path)
    with pytest.raises(MissingDataError, match="val_count=10000 of 3"):
        FFHQ(tmp_path, count=None)
    (tmp_path / "00000" / "00001.png").write_bytes(b"\x89PNG no")
    with pytest.raises(OSError, match=r"cannot decode .*00001.png"):
        FFHQ(tmp_path, "all", SMALL, count=None)[1]
    picture(0).save(tmp_path / "00002.jpg")
    with pytest.raises(MissingDataError, match="the same number"):
        FFHQ(tmp_path, "all", count=None)


# ------------------------------------------------------------------ LSUN
def test_lmdb_as_the_library_writes_it() -> None:
    reader = LMDBReader(FILES / "church_outdoor_val_lmdb")
    keys = list(reader.keys())
    assert len(reader) == len(keys) == 5 and keys == sorted(keys) and all(len(key) == 40 for key in keys)
    values = {key: reader.value_at(start, length) for key, start, length in reader.places()}
    assert sum(value[:4] == b"RIFF" for value in values.values()) == 4
    assert max(map(len, values.values())) > 3000, "one lies on pages of its own"
    again = pickle.loads(pickle.dumps(reader))
    assert list(again.keys()) == keys


def test_lsun_reads_lmdb_and_folders_alike(tmp_path) -> None:
    data = LSUN(FILES, "church", "val", SMALL)
    assert len(data) == 5 and {data[i]["image"].shape for i in range(5)} == {(3, 16, 16)}
    folder = tmp_path / "church_outdoor_val" / "a"
    folder.mkdir(parents=True)
    reader = LMDBReader(FILES / "church_outdoor_val_lmdb")
    for key, start, length in reader.places():
        value = reader.value_at(start, length)
        (folder / f"{key.decode()}{'.webp' if value[:4] == b'RIFF' else '.jpg'}").write_bytes(value)
    files = LSUN(tmp_path, "church", "val", SMALL, storage="folder")
    assert len(files) == 5
    for i in range(5):
        assert data[i]["sample_id"] in files[i]["sample_id"]
        assert torch.equal(data[i]["image"], files[i]["image"])


def test_lsun_objects_have_one_file_that_is_split(tmp_path) -> None:
    shutil.copytree(FILES / "church_outdoor_val_lmdb", tmp_path / "cat")
    train, val = (LSUN(tmp_path, "cat", split, SMALL, val_count=2) for split in ("train", "val"))
    names = [d[i]["sample_id"] for d in (train, val) for i in range(len(d))]
    assert (len(train), len(val)) == (3, 2) and len(set(names)) == 5
    with pytest.raises(MissingDataError, match="val_count=5000 of 5"):
        LSUN(tmp_path, "cat", "train")


def test_lsun_names_what_is_missing_or_broken(tmp_path) -> None:
    with pytest.raises(MissingDataError, match=r"bedroom_train_lmdb/data.mdb"):
        LSUN(None, "bedroom")
    with pytest.raises(MissingDataError, match=r"church_outdoor_train_lmdb"):
        LSUN(tmp_path, "church")
    place = tmp_path / "bedroom_val_lmdb"
    place.mkdir()
    whole = (FILES / "church_outdoor_val_lmdb" / "data.mdb").read_bytes()
    for broken, message in (
        (whole[:9000], "cut off"),
        (b"no database" * 2000, "no LMDB file"),
        (whole[:100], "100 bytes are no LMDB"),
    ):
        (place / "data.mdb").write_bytes(broken)
        with pytest.raises(LMDBError, match=message) as error:
            LSUN(tmp_path, "bedroom", "val")
        assert "data.mdb" in str(error.value)
    spoiled = bytearray(whole)
    start = max(LMDBReader(FILES / "church_outdoor_val_lmdb").places(), key=lambda p: p[2])[1]
    spoiled[start : start + 16] = bytes(16)
    (place / "data.mdb").write_bytes(spoiled)
    data = LSUN(tmp_path, "bedroom", "val", SMALL)
    with pytest.raises(OSError, match=r"cannot decode [0-9a-f]{40} of .*data.mdb"):
        [data[i] for i in range(5)]


# ------------------------------------------------------------------ transforms
def test_pictures_become_tensors_in_the_range() -> None:
    white = Image.new("RGB", (40, 24), "white")
    white.paste((0, 0, 0), (0, 0, 8, 24))
    out = TokenizerTransform(24, "centre", flip=0.0)(white)
    assert out.shape == (3, 24, 24) and out.dtype == torch.float32
    assert out[:, :, 0].max() == 1, "the middle 24 of 40 columns begin after the black ones"
    left = torch.stack([TokenizerTransform(24, "random", flip=0.0)(white)[0, 0, 0] for _ in range(40)])
    assert left.min() == -1 and left.max() == 1, "random crops begin inside and outside of them"
    grey = Image.new("L", (30, 30), 128)
    assert torch.allclose(SMALL(grey), torch.full((3, 16, 16), 128 / 127.5 - 1), atol=1e-6)


def test_scaled_crops_and_flips() -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 100, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    torch.manual_seed(0)
    spans = [
        (out[0, 0].max() - out[0, 0].min()).item() / 2
        for out in (TokenizerTransform(50, "scaled", (0.5, 0.6), 0.0)(ramp) for _ in range(20))
    ]
    assert min(spans) > 0.45 and max(spans) < 0.62
    assert TokenizerTransform(50, "centre", flip=1.0)(ramp)[0, 0, 0] > 0.9
    with pytest.raises(ValueError, match="unknown crop"):
        TokenizerTransform(16, "middle")
    with pytest.raises(ValueError, match="scale"):
        TokenizerTransform(16, scale=(0.9, 0.8))


def test_imagenet_goes_through_the_common_reader(tmp_path) -> None:
    for wnid in ("n01440764", "n01443537"):
        folder = tmp_path / "train" / wnid
        folder.mkdir(parents=True)
        picture(1, (30, 20)).save(folder / f"{wnid}_1.JPEG")
    data = ImageNet(tmp_path, "train", SMALL, num_classes=2)
    assert data[1]["label"] == 1 and data[1]["image"].shape == (3, 16, 16) and data[1]["image"].min() >= -1
