"""Images in folders and zip archives: what is found, and what is said when it is not."""

import os
import pickle
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import (
    DataFileError,
    ImageFolder,
    ImageNet,
    ImageZip,
    MissingDataError,
    PackedStrings,
    SampleError,
    SeededDataset,
    TrainTransform,
    build_loader,
    load_image,
    to_pil,
)
from core.data import folder as folder_module


def write_image(path, value, size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value, 255 - value, 7)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def root(tmp_path):
    """ImageNet's layout: two classes, three training and two validation images."""
    write_image(tmp_path / "train/n01/a.png", 10)
    write_image(tmp_path / "train/n01/b.JPEG", 20)
    write_image(tmp_path / "train/n02/deeper/c.png", 30)
    write_image(tmp_path / "val/n01/d.png", 40)
    write_image(tmp_path / "val/n02/e.png", 50, mode="L")
    (tmp_path / "train/n01/notes.txt").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path


def test_classes_are_the_sorted_folders(root):
    data = ImageFolder(root, "train")
    assert data.classes == ["n01", "n02"] and data.labels.tolist() == [0, 0, 1]
    samples = [data[i] for i in range(len(data))]
    assert [sample["sample_id"] for sample in samples] == ["n01/a.png", "n01/b.JPEG", "n02/deeper/c.png"]
    assert [sample["label"] for sample in samples] == [0, 0, 1]
    assert samples[0]["image"].dtype == torch.uint8 and samples[0]["image"].shape == (3, 5, 6)
    assert samples[2]["image"][:, 0, 0].tolist() == [30, 225, 7]
    assert ImageFolder(root, "val")[1]["image"][:, 0, 0].tolist() == [50, 50, 50], "grey images become RGB"
    assert data.describe(2) == str(root / "train/n02/deeper/c.png")


def test_chosen_classes_have_their_place_in_the_list(root):
    data = ImageFolder(root, "train", classes=["n02", "n01"])
    assert data.labels.tolist() == [0, 1, 1]
    with pytest.raises(MissingDataError, match=r"no folder for 1 classes, first 'n03': did you mean"):
        ImageFolder(root, "train", classes=["n01", "n03"])


def test_a_missing_root_says_what_to_do(tmp_path):
    with pytest.raises(MissingDataError) as caught:
        ImageFolder(tmp_path / "nowhere", "train", prepare="python tools/prepare_data.py digits root=DIR")
    message = str(caught.value)
    assert f"there is no folder '{tmp_path}/nowhere'" in message
    assert "train_dataloader.dataset.root" in message
    assert "root/train/<class>/<image>.jpg" in message
    assert "python tools/prepare_data.py digits root=DIR" in message
    with pytest.raises(MissingDataError, match="no folder is configured"):
        ImageFolder(None, "train")
    with pytest.raises(MissingDataError, match="split 'test'"):
        ImageFolder(tmp_path, "test")


def test_folders_without_images_are_named(root):
    with pytest.raises(MissingDataError, match="holds no class folders"):
        ImageFolder(root / "train/n01")
    (root / "train/n03").mkdir()
    (root / "train/n03/x.heic").write_text("")
    with pytest.raises(MissingDataError, match=r"1 of 3 class folders hold no image, .*n03 .file types there: .heic"):
        ImageFolder(root, "train")


def test_the_kept_file_list_is_used_until_a_folder_changes(root, tmp_path, monkeypatch):
    index = tmp_path / "cache/train.npz"
    first = ImageFolder(root, "train", index_file=index)
    assert index.is_file()
    scans = []
    scan = folder_module._scan
    monkeypatch.setattr(folder_module, "_scan", lambda *args: scans.append(args) or scan(*args))
    again = ImageFolder(root, "train", index_file=index)
    assert not scans and list(again.files) == list(first.files) and again.labels.tolist() == first.labels.tolist()
    assert again[2]["label"] == 1
    # The folder's time of change may have the clock tick's resolution.
    time.sleep(0.02)
    write_image(root / "train/n02/deeper/new.png", 60)
    assert len(ImageFolder(root, "train", index_file=index)) == 4 and len(scans) == 1
    assert len(ImageFolder(root, "train", index_file=index)) == 4 and len(scans) == 1
    shutil.rmtree(root / "train/n02/deeper")
    write_image(root / "train/n02/f.png", 70)
    assert list(ImageFolder(root, "train", index_file=index).files)[-1] == "n02/f.png"
    ImageFolder(root, "train", classes=["n02"], index_file=index)
    assert len(scans) == 3
    index.write_bytes(b"broken")
    assert len(ImageFolder(root, "train", index_file=index)) == 3


def test_a_broken_image_is_an_error_that_names_the_file(root):
    path = root / "train/n01/b.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OSError, match=f"cannot decode {path}"):
        ImageFolder(root, "train")[1]
    with pytest.raises(SampleError, match=rf"ImageFolder\[1\] \({path}\)"):
        SeededDataset(ImageFolder(root, "train"))[1]
    path.unlink()
    data = ImageFolder(root, "train")
    (root / "train/n01/a.png").unlink()
    with pytest.raises(FileNotFoundError):
        data[0]


@pytest.mark.child
def test_folders_are_loaded_by_workers_with_the_training_transform(root):
    def images(workers):
        data = ImageFolder(root, "train", TrainTransform(size=16))
        loader = build_loader({"dataset": data, "batch_size": 3, "num_workers": workers}, seed=1, training=True)
        return next(iter(loader)).data

    alone = images(0)
    assert alone["image"].shape == (3, 3, 16, 16) and sorted(alone["label"].tolist()) == [0, 0, 1]
    for workers in (1, 2):
        other = images(workers)
        assert torch.equal(other["image"], alone["image"]) and other["sample_id"] == alone["sample_id"]


# ---------------------------------------------------------------------------- zip


@pytest.fixture(params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def archive(root, request):
    with zipfile.ZipFile(root / "train.zip", "w", request.param) as opened:
        for name in ("n02/deeper/c.png", "n01/a.png", "n01/b.JPEG"):
            opened.write(root / "train" / name, name)
    (root / "train_map.txt").write_text("n01/a.png\t0\nn01/b.JPEG\t0\n\nn02/deeper/c.png\t1\n")
    return root


@pytest.mark.child
def test_a_zip_archive_gives_what_the_folder_gives(archive):
    folder, zipped = ImageFolder(archive, "train"), ImageZip(archive, "train")
    copy = pickle.loads(pickle.dumps(zipped))
    assert len(zipped) == len(folder)
    for expected, sample, copied in zip(folder, zipped, copy, strict=False):
        assert sample["sample_id"] == expected["sample_id"] and sample["label"] == expected["label"]
        assert torch.equal(sample["image"], expected["image"]) and torch.equal(copied["image"], expected["image"])
    loader = build_loader({"dataset": zipped, "batch_size": 3, "num_workers": 2}, seed=0, training=False)
    assert next(iter(loader)).data["label"].tolist() == [0, 0, 1]


def test_mistakes_in_an_archive_are_named(archive):
    listing = archive / "train_map.txt"
    good = listing.read_text()
    listing.write_text(good + "n01/gone.png\t0\n")
    with pytest.raises(MissingDataError, match=r"lists 1 files that .*train.zip does not hold, first 'n01/gone.png'"):
        ImageZip(archive, "train")
    listing.write_text("n01/a.png 0\n")
    with pytest.raises(MissingDataError, match=r"train_map.txt, line 1: expected path<TAB>class index: 'n01/a.png 0'"):
        ImageZip(archive, "train")
    listing.write_text("")
    with pytest.raises(MissingDataError, match="lists no image"):
        ImageZip(archive, "train")
    with pytest.raises(MissingDataError, match=r"root/val.zip"):
        ImageZip(archive, "val")
    (archive / "train.zip").write_bytes(b"no archive")
    listing.write_text(good)
    with pytest.raises(DataFileError, match=r"train\.zip' cannot be read: File is not a zip file\. Copy or make"):
        ImageZip(archive, "train")


def test_damage_inside_an_archive_is_noticed(archive):
    zipped = ImageZip(archive, "train")
    path = archive / "train.zip"
    start, size, _, _ = zipped._entries[0]
    data = bytearray(path.read_bytes())
    data[start + 40 + size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"train.zip: n01/a.png"):
        SeededDataset(ImageZip(archive, "train"))[0]


# ---------------------------------------------------------------------------- ImageNet


def test_imagenet_is_the_same_from_folder_zip_and_shards(archive):
    import tarfile

    with tarfile.open(archive / "train-000000.tar", "w") as shard:
        for key, (name, label) in enumerate([("n01/a.png", 0), ("n01/b.JPEG", 0), ("n02/deeper/c.png", 1)]):
            extension = name.rpartition(".")[2].lower()
            shard.add(archive / "train" / name, f"{key:06d}.{extension}")
            (archive / "label").write_text(str(label))
            shard.add(archive / "label", f"{key:06d}.cls")
    sets = [ImageNet(archive, "train", storage=kind, num_classes=2) for kind in ("folder", "zip", "shards")]
    for samples in zip(*sets, strict=False):
        assert len({sample["label"] for sample in samples}) == 1
        assert all(torch.equal(sample["image"], samples[0]["image"]) for sample in samples)
    assert [len(data) for data in sets] == [3, 3, 3]


@pytest.mark.parametrize("storage", ["folder", "zip", "shards"])
def test_imagenet_says_what_it_expects(archive, tmp_path, storage):
    with pytest.raises(MissingDataError, match=r"(?s)ImageNet \(.*dataset.root.*root/.*prepare_data.py imag"):
        ImageNet(tmp_path / "nowhere", storage=storage)
    if storage != "shards":
        with pytest.raises(MissingDataError, match="has 2 classes, expected 1000; for a subset set num_classes: 2"):
            ImageNet(archive, storage=storage)
    with pytest.raises(ValueError, match="storage must be one of folder, zip, shards"):
        ImageNet(archive, storage="lmdb")


# ---------------------------------------------------------------------------- parts


def test_packed_strings_are_a_sequence_and_two_arrays():
    names = ["", "a", "ü/日本.jpg", os.fsdecode(b"bad\xff"), "z" * 1000]
    packed = pickle.loads(pickle.dumps(PackedStrings(names)))
    assert list(packed) == names and packed[-1] == names[-1] and len(packed) == 5
    assert PackedStrings.from_arrays(packed.data, packed.offsets)[2] == names[2]
    assert list(PackedStrings()) == []
    with pytest.raises(IndexError):
        packed[5]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (3, 2), 9),
        np.full((2, 3), 9, np.uint8),
        np.full((2, 3, 3), 9, np.uint8),
        torch.full((3, 2, 3), 9, dtype=torch.uint8),
        torch.full((1, 2, 3), 9, dtype=torch.uint8),
        torch.full((2, 3), 9, dtype=torch.uint8),
    ],
)
def test_every_form_of_an_image_becomes_one(image):
    assert np.array(to_pil(image)).tolist() == np.full((2, 3, 3), 9).tolist()
    assert to_pil(image, "L").mode == "L"


def test_images_need_bytes_that_are_one(tmp_path):
    with pytest.raises(OSError, match="cannot decode shard 3"):
        load_image(b"nonsense", name="shard 3")
    with pytest.raises(TypeError, match="uint8, not float32"):
        to_pil(np.zeros((2, 2), np.float32))
