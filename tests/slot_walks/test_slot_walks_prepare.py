"""Preparation: MOVi's records without TensorFlow, SBD's labels for VOC, drawn scenes through the real readers."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from core.data import MissingDataError
from core.data.prepare import run_task
from core.errors import ConfigError
from slot_walks.data import VOC, Birds, CropTrain, MOVi, Square
from slot_walks.data.files import load_labels
from slot_walks.data.tfrecord import _masked_crc, parse_example, read_records
from slot_walks.standin.blobworld import draw_scene, scene_seed


# ---------------------------------------------------------------------- writing the format, independently
def varint(number):
    out = b""
    number &= 2**64 - 1
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(**features):
    """A tf.train.Example: lists of bytes, float arrays (packed) and int lists (one value a field)."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, np.ndarray):
            feature = field(2, field(1, value.astype("<f4").tobytes()))
        elif value and isinstance(value[0], int):
            feature = field(3, b"".join(varint(1 << 3) + varint(v) for v in value))
        else:
            feature = field(1, b"".join(field(1, v) for v in value))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + struct.pack("<I", _masked_crc(length)) + record + b"crc!")


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


def clip(seed, frames=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    pictures = coarse.repeat(8, 1).repeat(8, 2)  # even areas, which JPEG keeps
    labels = rng.integers(0, 11, (frames, 32, 32), dtype=np.uint8)
    return pictures, labels


# ---------------------------------------------------------------------- records
def test_checksums_are_the_formats():
    # CRC-32C of the standard's test string is E3069283; the format rotates it by 15 and adds a constant.
    crc = 0xE3069283
    assert _masked_crc(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_examples_are_parsed(tmp_path):
    record = example(video=[b"a", b"", b"c" * 300], scale=np.array([0.5, -2.0]), numbers=[3, -1, 2**40], none=[])
    found = parse_example(record)
    assert found["video"] == [b"a", b"", b"c" * 300] and found["none"] == []
    assert found["scale"].tolist() == [0.5, -2.0] and found["numbers"].tolist() == [3, -1, 2**40]
    packed = field(1, field(1, field(1, b"n") + field(2, field(3, field(1, varint(5) + varint(600))))))
    assert parse_example(packed)["n"].tolist() == [5, 600]
    for broken in (record[:-5], b"\xff\xff", b"no example at all"):
        with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
            parse_example(broken)


def test_record_files_that_are_cut_or_damaged_are_named(tmp_path):
    path = tmp_path / "x.tfrecord"
    write_records(path, [b"first", b"second" * 100])
    assert list(read_records(path)) == [b"first", b"second" * 100]
    whole = path.read_bytes()
    for cut in (len(whole) - 2, len(whole) - 100, 25):
        path.write_bytes(whole[:cut])
        with pytest.raises(OSError, match=r"x\.tfrecord ends within a record, at byte 21"):
            list(read_records(path))
    path.write_bytes(b"\x01" + whole[1:])
    with pytest.raises(OSError, match=r"x\.tfrecord is no TFRecord file, or damaged at byte 0"):
        list(read_records(path))


# ---------------------------------------------------------------------- MOVi
def movi_records(source):
    for split, seeds in (("train", (0, 1)), ("validation", (2,))):
        for shard, seed in enumerate(seeds):
            pictures, labels = clip(seed)
            record = example(
                video=[png(p) for p in pictures], segmentations=[png(m) for m in labels], **{"metadata/seed": [seed]}
            )
            write_records(source / f"movi_c-{split}.tfrecord-{shard:05d}-of-{len(seeds):05d}", [record])


def test_movi_records_become_frames_that_the_reader_takes(tmp_path):
    movi_records(tmp_path / "source")
    words = [f"source={tmp_path / 'source'}", f"output={tmp_path / 'MOVI'}", "level=C"]
    said = run_task("slot_walks", "movi", words)
    assert "2 clips, 6 frames" in said and "1 clips, 3 frames" in said
    data = MOVi(tmp_path / "MOVI", "C", "validation", transform=Square(32, "none"))
    pictures, labels = clip(2)
    assert len(data) == 3
    for frame in range(3):
        assert torch.equal(data[frame]["mask"], torch.from_numpy(labels[frame]).long())
        assert np.abs(data[frame]["image"].numpy() * 255 - pictures[frame].transpose(2, 0, 1)).mean() < 3
    train = MOVi(tmp_path / "MOVI", "C", "train", transform=CropTrain(None, 24))
    assert sorted({f.split("/")[0] for f in train.frames}) == ["00000", "00001"]
    frames = sorted((tmp_path / "MOVI").rglob("*.*"))
    assert len(frames) == 18 and not [f for f in frames if ".part" in str(f)]


def test_movi_goes_on_where_it_was(tmp_path):
    movi_records(tmp_path / "source")
    words = [f"source={tmp_path / 'source'}", f"output={tmp_path / 'MOVI'}", "splits=train"]
    run_task("slot_walks", "movi", words)
    base = tmp_path / "MOVI" / "C" / "train"
    kept = base / "rgb/00000/00000.jpg"
    stamp = kept.stat().st_mtime_ns
    # As if the second clip had been interrupted: labels are written first, pictures make it whole.
    for file in (base / "rgb/00001").iterdir():
        file.unlink()
    (base / "rgb/00001").rmdir()
    assert "2 clips, 6 frames" in run_task("slot_walks", "movi", words)
    assert kept.stat().st_mtime_ns == stamp and len(list((base / "rgb/00001").iterdir())) == 3


def test_movi_without_records_or_with_others_says_so(tmp_path):
    with pytest.raises(MissingDataError, match="gs://kubric-public"):
        run_task("slot_walks", "movi", [f"source={tmp_path}", f"output={tmp_path / 'out'}"])
    write_records(tmp_path / "movi_c-train.tfrecord-00000-of-00001", [example(image=[b"x"])])
    with pytest.raises(ValueError, match=r"movi_c-train\.tfrecord-00000-of-00001, 0: no clip of MOVi"):
        run_task("slot_walks", "movi", [f"source={tmp_path}", f"output={tmp_path / 'out'}"])


# ---------------------------------------------------------------------- SBD
def test_sbd_fills_up_vocs_training_list(tmp_path):
    voc, sbd = tmp_path / "VOC2012", tmp_path / "dataset"
    for folder in (voc / "ImageSets/Segmentation", voc / "SegmentationClass", voc / "JPEGImages", sbd / "cls"):
        folder.mkdir(parents=True)
    own = np.full((6, 8), 3, np.uint8)
    Image.fromarray(own).save(voc / "SegmentationClass/a.png")
    (voc / "ImageSets/Segmentation/train.txt").write_text("a\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("v\n")
    (sbd / "train.txt").write_text("b\nv\n")
    (sbd / "val.txt").write_text("c\na\n")
    theirs = {name: np.full((6, 8), label, np.uint8) for name, label in (("a", 9), ("b", 15), ("c", 20), ("v", 1))}
    for name, labels in theirs.items():
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels, "Boundaries": [], "Categories": []}})
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
    assert "3 pictures" in run_task("slot_walks", "voc_trainaug", [f"voc={voc}", f"sbd={sbd}"])
    assert (voc / "ImageSets/Segmentation/trainaug.txt").read_text().split() == ["a", "b", "c"]
    found = {name: load_labels(voc / "SegmentationClassAug" / f"{name}.png") for name in "abc"}
    assert [int(found[name].max()) for name in "abc"] == [3, 15, 20]  # VOC's own labels where there are
    data = VOC(voc, "trainaug", transform=Square(8), protocol="official", masks=True)
    assert [int(data[i]["mask"].max()) for i in range(3)] == [3, 15, 20]
    (voc / "SegmentationClassAug/b.png").unlink()
    (sbd / "cls/b.mat").write_bytes(b"broken")
    with pytest.raises(OSError, match=r"b\.mat"):
        run_task("slot_walks", "voc_trainaug", [f"voc={voc}", f"sbd={sbd}"])
    (sbd / "cls/b.mat").unlink()
    with pytest.raises(MissingDataError, match=r"b\.mat"):
        run_task("slot_walks", "voc_trainaug", [f"voc={voc}", f"sbd={sbd}"])


# ---------------------------------------------------------------------- drawn scenes
def test_drawn_scenes_pass_through_vocs_files(tmp_path):
    root = tmp_path / "blobs"
    words = [f"root={root}", "train=3", "val=2", "seed=5"]
    assert "3 + 2 scenes" in run_task("slot_walks", "blobworld", words)
    data = VOC(root, "val", transform=Square(64, "none"))
    assert len(data) == 2 and len(VOC(root, "trainaug")) == len(VOC(root, "train")) == 3
    for index in range(2):
        scene = draw_scene(scene_seed("val", 5, index))
        sample = data[index]
        assert torch.equal(sample["mask"], torch.from_numpy(scene.instances).long())
        assert torch.equal(sample["classes"], torch.from_numpy(scene.categories).long())
        assert not sample["void"].any()
        assert (sample["image"] - torch.from_numpy(scene.image.transpose(2, 0, 1))).abs().mean() < 0.02
    stamp = (root / "VOC2012/JPEGImages/train_000000.jpg").stat().st_mtime_ns
    run_task("slot_walks", "blobworld", words)
    assert (root / "VOC2012/JPEGImages/train_000000.jpg").stat().st_mtime_ns == stamp
    assert VOC(root, "trainaug", masks=True, protocol="official", transform=Square(64))[2]["mask"].max() <= 6
    with pytest.raises(ConfigError, match="give an empty root="):
        run_task("slot_walks", "blobworld", [f"root={root}", "train=4"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        run_task("slot_walks", "blobworld", [f"root={tmp_path / 'other'}"])


def test_drawn_foregrounds_pass_through_the_files_of_birds(tmp_path):
    root = tmp_path / "fe"
    run_task("slot_walks", "blobworld_fe", [f"root={root}", "train=2", "val=2", "test=1"])
    assert [len(Birds(root, split)) for split in ("train", "val", "test")] == [2, 2, 1]
    data = Birds(root, "val")
    for index in range(2):
        mask = draw_scene(scene_seed("val", 0, index), foreground=True).instances
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        assert data.boxes[index] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        sample = data[index]
        assert sample["image"].shape == (3, 128, 128) and sample["image"].min() < -0.2
        # The window is about one and a half boxes wide.
        assert 0.1 < sample["mask"].float().mean() < 0.8
    for task, words in (("blobworld_fe", ["val=0"]), ("blobworld", ["most=7"]), ("blobworld", ["size=8"])):
        with pytest.raises(ConfigError, match="at least one scene"):
            run_task("slot_walks", task, [f"root={tmp_path / 'new'}", *words])
