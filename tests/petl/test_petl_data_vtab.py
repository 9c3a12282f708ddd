"""VTAB-1k in NOAH's layout, as PNG files, arrays and the published data sets; broken and missing files."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from core.data import DataFileError, MissingDataError, load_image
from core.errors import ConfigError
from petl.data import GROUPS, TASKS, VTAB1k
from petl.data import vtab as module
from tests.petl import data_files as files


def small(root, task="kitti", split="train800val200", **further):
    return VTAB1k(root, task, split, **{"size": 8, "sizes": "report", **further})


def test_tasks_are_those_of_the_benchmark():
    assert [task.classes for task in TASKS.values()] == [
        100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9,
    ]  # fmt: skip
    assert [len(members) for members in GROUPS.values()] == [7, 4, 8]
    heads = [769 * task.classes for task in TASKS.values()]
    assert round(sum(heads) / 19) == 38045
    assert sum(task.test for task in TASKS.values()) == sum(
        (
            10000,
            6084,
            1880,
            6149,
            3669,
            26032,
            21750,
            32768,
            5400,
            6300,
            42670,
            15000,
            15000,
            22735,
            711,
            2 * 73728,
            2 * 12150,
        )
    )


def test_samples_are_the_listed_images(tmp_path):
    data = small(files.vtab(tmp_path), split="test")
    assert len(data) == 5 and data.num_classes == 4 and data.labels.tolist() == [0, 1, 2, 3, 3]
    sample = data[2]
    path = tmp_path / "kitti/images/test/000002.jpg"
    assert sample["sample_id"] == "images/test/000002.jpg" and sample["label"] == 2 and data.describe(2) == str(path)
    # What the released code does, by torchvision's own transforms.
    expected = transforms.Compose(
        [
            transforms.Resize((8, 8), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(load_image(path))
    assert torch.equal(sample["image"], expected)
    assert data.source_files()[0].endswith("test/000000.jpg") and len(data.source_files()) == 5


@pytest.mark.parametrize("folder, asked", [("cifar100", "cifar"), ("oxford_pet", "oxford_iiit_pet"), ("svhn", "svhn")])
def test_other_names_of_folders_and_tasks(tmp_path, folder, asked):
    files.vtab(tmp_path, folder)
    for name in (folder, asked):
        assert small(tmp_path, name).task == asked


def test_an_unknown_task_split_source_or_norm_is_named(tmp_path):
    files.vtab(tmp_path)
    with pytest.raises(ConfigError, match="no task 'kity': did you mean 'kitti'"):
        small(tmp_path, "kity")
    for key, value in (
        ("split", "train"),
        ("source", "jpeg"),
        ("norm", "imagnet"),
        ("sizes", "ignore"),
        ("aug", "random"),
    ):
        with pytest.raises(ConfigError, match=f"{key}={value}"):
            small(tmp_path, **{key: value})


def test_another_number_of_images_is_an_error_that_says_task_expected_and_found(tmp_path, caplog):
    files.vtab(tmp_path)
    for split, expected, found in (
        ("train800", 800, 4),
        ("val200", 200, 2),
        ("train800val200", 1000, 6),
        ("test", 711, 5),
    ):
        with pytest.raises(
            DataFileError, match=rf"kitti, {split}: expected {expected} images, found {found} .*sizes: report"
        ):
            small(tmp_path, split=split, sizes="check")
    with caplog.at_level(logging.WARNING):
        data = small(tmp_path, split="test")
    assert data.report["whole"] is False


def test_a_whole_task_passes(tmp_path, monkeypatch):
    monkeypatch.setitem(module.SPLITS, "train800val200", 6)
    assert small(files.vtab(tmp_path), sizes="check").origin["whole"] is True


def test_classes_without_a_training_image_and_what_they_cost_are_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("petl.data.listed.tell", told.append)
    files.vtab(tmp_path)
    assert small(tmp_path, split="train800").report["untrained_classes"] == [3]
    assert "1 of 4 classes have no training image: 3" in told[-1]
    val = small(tmp_path, split="val200")
    assert (val.report["untrained_classes"], val.report["uncovered"]) == ([3], 1)
    assert "1 of 2 images are of classes without a training image" in told[-1]
    told.clear()
    test = small(tmp_path, split="test")  # held against train800val200, where class 3 has an image
    assert test.report["uncovered"] == 0 and test.report["untrained_classes"] == []
    assert not any("without a training image" in line for line in told)


def test_the_origin_says_what_figures_rest_on(tmp_path):
    files.vtab(tmp_path / "jpeg")
    files.vtab(tmp_path / "png", suffix=".png")
    lossy = small(tmp_path / "jpeg", split="test").origin
    exact = small(tmp_path / "png", split="test", source="png", norm="inception").origin
    assert (lossy["source"], lossy["norm"], lossy["lossy"]) == ("noah_jpeg", "imagenet", 1.0)
    assert (exact["source"], exact["norm"], exact["lossy"], exact["mean"]) == ("png", "inception", 0.0, [0.5] * 3)
    assert lossy["data"] == "vtab1k" and lossy["task"] == "kitti" and lossy["split"] == "test" and lossy["images"] == 5
    again = small(tmp_path / "jpeg", split="test").origin
    assert again == lossy and lossy["lists"] != small(tmp_path / "jpeg", split="val200").origin["lists"]


def test_images_of_another_source_than_configured_are_refused(tmp_path):
    files.vtab(tmp_path / "jpeg")
    with pytest.raises(DataFileError, match=r"source=png means files that end with \.png, but 6 of 6.*dataset\.source"):
        small(tmp_path / "jpeg", source="png")
    files.vtab(tmp_path / "png", suffix=".png")
    with pytest.raises(DataFileError, match="source=noah_jpeg"):
        small(tmp_path / "png")
    with pytest.raises(DataFileError, match="needs lines `<index> <class>`"):
        (tmp_path / "png/kitti/images.npy").write_bytes(b"")
        small(tmp_path / "png", source="tensors")


def test_backbone_normalisation_is_the_checkpoints(tmp_path):
    files.vtab(tmp_path)
    data = small(tmp_path, norm="backbone", backbone="vit_base_patch16_224.orig_in21k")
    assert data.transform.mean == (0.5, 0.5, 0.5) and data.origin["norm"] == "backbone"
    with pytest.raises(ConfigError, match="norm=backbone needs backbone=NAME"):
        small(tmp_path, norm="backbone")
    with pytest.raises(ConfigError, match=r"did you mean 'vit_base_patch16_224\.orig_in21k'"):
        small(tmp_path, norm="backbone", backbone="vit_base_patch16_224.org_in21k")


def test_broken_lists_and_missing_files_are_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"dataset\.root"):
        small(None)
    with pytest.raises(MissingDataError, match="no folder kitti"):
        small(tmp_path)
    files.vtab(tmp_path)
    path = tmp_path / "kitti/test.txt"
    text = path.read_text()
    for broken, kind, reason in (
        ("images/test/000000.jpg four\n", MissingDataError, r"test\.txt, line 1: expected"),
        ("images/test/000000.jpg 4\n", DataFileError, "the class 4, but classes are 0 to 3"),
        (text + text.splitlines()[0], DataFileError, "lists 1 images more than once.*count twice"),
        ("grün 1\n", DataFileError, r"test\.txt' is not UTF-8"),
        ("", MissingDataError, "lists no images"),
    ):
        path.write_bytes(broken.encode("latin-1"))
        with pytest.raises(kind, match=reason):
            small(tmp_path, split="test")
    path.unlink()
    with pytest.raises(MissingDataError, match=r"there is no list .*test\.txt"):
        small(tmp_path, split="test")
    (tmp_path / "kitti/images/train800val200/000005.jpg").unlink()
    with pytest.raises(MissingDataError, match=r"there is no image .*000005\.jpg.*vtab_png"):
        small(tmp_path)


def test_a_repeated_training_image_is_reported(tmp_path):
    files.vtab(tmp_path)
    path = tmp_path / "kitti/train800.txt"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    assert small(tmp_path, split="train800").report["repeated"] == 1


def test_a_broken_image_is_named(tmp_path):
    files.vtab(tmp_path)
    (tmp_path / "kitti/images/test/000001.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(DataFileError, match=r"000001\.jpg"):
        small(tmp_path, split="test")[1]


# ---------------------------------------------------------------------- augmentation
def test_flips_and_random_augmentation_where_a_task_allows_them(tmp_path):
    for task in ("kitti", "dsprites_loc", "smallnorb_azi", "svhn"):
        files.vtab(tmp_path, task)
    assert small(tmp_path, "svhn", aug="rand").transform.flip == 0.5
    assert small(tmp_path, "svhn", aug="rand", flip=0.0).transform.flip == 0.0
    assert small(tmp_path, "kitti", aug="rand").transform.flip == 0.0
    with pytest.raises(ConfigError, match="mirrored images of kitti are wrong"):
        small(tmp_path, "kitti", aug="rand", flip=0.5)
    for task in ("dsprites_loc", "smallnorb_azi"):
        with pytest.raises(ConfigError, match=f"{task} asks for position or orientation"):
            small(tmp_path, task, aug="rand")
    with pytest.raises(ConfigError, match="aug=rand on test, which is evaluated"):
        small(tmp_path, "svhn", "test", aug="rand")


# ---------------------------------------------------------------------- arrays
@pytest.mark.parametrize("grey", [False, True])
def test_rows_of_an_array(tmp_path, grey):
    folder = tmp_path / "dsprites_ori"
    folder.mkdir()
    array = np.stack([files.pixels(i, 80, 80) for i in range(6)])
    array = array[..., 0] if grey else array
    np.save(folder / "images.npy", array)
    (folder / "train800val200.txt").write_text("4 3\n0 15\n")
    data = small(tmp_path, "dsprites_ori", source="tensors")
    expected = np.repeat(array[4][..., None], 3, 2) if grey else array[4]
    assert np.array_equal(np.asarray(data.image(0)), expected)
    assert data[0]["label"] == 3 and data[0]["image"].shape == (3, 8, 8) and data.origin["source"] == "tensors"
    assert data.describe(0) == f"image 4 of {folder / 'images.npy'}"
    sent = pickle.dumps(data)  # to a worker process, without the array
    assert len(sent) < array.nbytes / 2 and np.array_equal(pickle.loads(sent).image(0), data.image(0))
    (folder / "train800val200.txt").write_text("6 3\n")
    with pytest.raises(DataFileError, match=r"asks for image 6, but there are 6 \(0 to 5\)"):
        small(tmp_path, "dsprites_ori", source="tensors")


def test_an_array_that_is_none_is_named(tmp_path):
    folder = tmp_path / "dsprites_ori"
    folder.mkdir()
    (folder / "train800val200.txt").write_text("0 3\n")
    with pytest.raises(MissingDataError, match=r"needs .*images\.npy.*vtab_tensors"):
        small(tmp_path, "dsprites_ori", source="tensors")
    np.save(folder / "images.npy", np.zeros((2, 4, 4)))
    with pytest.raises(DataFileError, match=r"holds float64 of shape \(2, 4, 4\)"):
        small(tmp_path, "dsprites_ori", source="tensors")
    (folder / "images.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataFileError, match=r"images\.npy' cannot be read"):
        small(tmp_path, "dsprites_ori", source="tensors")


# ---------------------------------------------------------------------- the published data set itself
def test_images_of_the_published_data_set(tmp_path):
    files.kitti(tmp_path / "published")
    folder = tmp_path / "vtab/kitti"
    folder.mkdir(parents=True)
    (folder / "train800val200.txt").write_text("2 2\n0 3\n")
    data = small(tmp_path / "vtab", source="originals", originals=tmp_path / "published")
    assert np.array_equal(np.asarray(data.image(0)), files.pixels(2)) and data.labels.tolist() == [2, 3]
    assert data.source_files()[0].endswith("000000.png") and "image 2 of" in data.describe(0)
    (folder / "train800val200.txt").write_text("2 2\n0 1\n")
    with pytest.raises(DataFileError, match=r"gives image 0 of KITTI the class 1, the data set 3 \(1 of 2 differ\)"):
        small(tmp_path / "vtab", source="originals", originals=tmp_path / "published")
    with pytest.raises(MissingDataError, match=r"originals is not set[\s\S]*download data_object_image_2\.zip"):
        small(tmp_path / "vtab", source="originals")


def test_a_grey_image_becomes_rgb(tmp_path):
    files.vtab(tmp_path, suffix=".png")
    Image.fromarray(np.full((20, 30), 7, dtype=np.uint8)).save(tmp_path / "kitti/images/test/000000.png")
    assert small(tmp_path, split="test", source="png")[0]["image"].shape == (3, 8, 8)
