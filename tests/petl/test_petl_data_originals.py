"""The published data sets behind VTAB-1k: classes as VTAB-1k derives them, missing and broken files; preparation."""

from __future__ import annotations

import json
import pickle
import sys
import types

import numpy as np
import pytest
from scipy.io import savemat

from core.data import DataFileError, MissingDataError
from core.data.prepare import run_task, tasks
from core.errors import ConfigError
from petl.data import FGVC, TASKS, VTAB1k
from petl.data.originals import FORMATS, open_original, read_norb
from tests.petl import data_files as files


# ---------------------------------------------------------------------- formats
def test_cifar(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    with pytest.raises(MissingDataError, match=r"torchvision's CIFAR100 says[\s\S]*cifar-100-python\.tar\.gz"):
        open_original("cifar", tmp_path)
    sums = files.cifar(tmp_path)
    with pytest.raises(MissingDataError, match="corrupted"):
        open_original("cifar", tmp_path)  # other files than the published ones are never unpickled
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    data = open_original("cifar", tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5]
    for index, seed in enumerate((0, 1, 2, 10, 11, 12)):
        assert np.array_equal(np.asarray(data.image(index)), files.pixels(seed, 32, 32))
    assert data.source_files() and all("cifar-100-python" in file for file in data.source_files())


def test_svhn(tmp_path, monkeypatch):
    from torchvision.datasets import SVHN

    images = np.stack([files.pixels(i, 32, 32) for i in range(2)], axis=-1)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [4]])})
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    data = open_original("svhn", tmp_path)
    assert data.labels.tolist() == [0, 4, 0, 4]  # ten stands for the digit 0
    assert np.array_equal(np.asarray(data.image(3)), files.pixels(1, 32, 32))


def test_flowers(tmp_path, monkeypatch):
    from torchvision.datasets import Flowers102

    folder = tmp_path / "flowers-102"
    for number in (1, 2, 3):
        files.save(folder / f"jpg/image_{number:05d}.jpg", seed=number)
    savemat(folder / "imagelabels.mat", {"labels": [[77, 1, 102]]})
    savemat(folder / "setid.mat", {"trnid": [[2, 3]], "valid": [[1, 3]], "tstid": [[3, 1]]})
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    data = open_original("oxford_flowers102", tmp_path)
    assert data.labels.tolist() == [0, 101, 76, 101, 101, 76] and data.files[0].endswith("image_00002.jpg")


def test_dtd_and_pets(tmp_path):
    data = open_original("dtd", files.dtd(tmp_path / "dtd"))
    assert [file.rpartition("/")[2] for file in data.files] == [
        "banded_train.jpg", "blotchy_train.jpg", "banded_val.jpg", "blotchy_test.jpg",
    ]  # fmt: skip
    assert len(data) == 4 and data.image(0).size == (30, 20)
    data = open_original("oxford_iiit_pet", files.pets(tmp_path / "pets"))
    assert data.labels.tolist() == [0, 1, 1]


def test_caltech_counts_the_background_and_sorts_without_capitals(tmp_path):
    names = ["BACKGROUND_Google", "Faces", "accordion", "zebra", "airplanes"]
    files.class_folders(tmp_path / "caltech101/101_ObjectCategories", names, count=1)
    data = open_original("caltech101", tmp_path)
    order = [file.split("/")[-2] for file in data.files]
    assert order == ["accordion", "airplanes", "BACKGROUND_Google", "Faces", "zebra"]
    assert data.labels.tolist() == [0, 1, 2, 3, 4]


def test_class_folders_of_eurosat_resisc_and_sun(tmp_path):
    files.class_folders(tmp_path / "eurosat/2750", ["River", "AnnualCrop"])
    assert open_original("eurosat", tmp_path).labels.tolist() == [0, 0, 1, 1]
    files.class_folders(tmp_path / "NWPU-RESISC45", ["airport", "airplane"])
    assert open_original("resisc45", tmp_path).files[0].endswith("airplane/image_0001.jpg")
    files.write(tmp_path / "SUN397/ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    for name in ("a/abbey", "a/apartment_building/outdoor"):
        files.save(tmp_path / f"SUN397/{name}/sun_a.jpg")
        files.save(tmp_path / f"SUN397/{name}/sun_b.jpg")
    data = open_original("sun397", tmp_path)
    assert data.labels.tolist() == [0, 0, 1, 1] and data.files[3].endswith("outdoor/sun_b.jpg")


def test_clevr(tmp_path):
    files.clevr(tmp_path)
    assert open_original("clevr_count", tmp_path).labels.tolist() == [0, 1, 0]
    # nearest 8.2, 10.1 and 7.5: classes of the bounds 0, 8, 8.5, 9, 9.5, 10
    assert open_original("clevr_dist", tmp_path).labels.tolist() == [1, 5, 0]
    path = tmp_path / "CLEVR_v1.0/scenes/CLEVR_val_scenes.json"
    content = json.loads(path.read_text())
    del content["scenes"][0]["objects"][0]["pixel_coords"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataFileError, match=r"CLEVR_val_scenes\.json': objects of scenes\[0\]"):
        open_original("clevr_dist", tmp_path)
    path.write_text('{"scenes": [{"image_filename": "a.png"}]}')
    with pytest.raises(DataFileError, match=r"objects of scenes\[0\] is missing"):
        open_original("clevr_count", tmp_path)


def test_kitti(tmp_path):
    files.kitti(tmp_path)
    # no vehicle, nearest vehicle at 7.9, 20.5 and 12 metres
    assert open_original("kitti", tmp_path).labels.tolist() == [3, 0, 2, 1]
    (tmp_path / "training/label_2/000001.txt").write_text("Car 0.00 0 -0.20\n")
    with pytest.raises(DataFileError, match=r"000001\.txt', line 1: 4 words"):
        open_original("kitti", tmp_path)
    (tmp_path / "training/label_2/000001.txt").unlink()
    with pytest.raises(MissingDataError, match=r"000001\.txt"):
        open_original("kitti", tmp_path)


def test_dsprites(tmp_path):
    files.dsprites(tmp_path)
    data = open_original("dsprites_loc", tmp_path)
    assert data.labels.tolist() == [0, 15, 0, 1]  # 32 columns, two to a class
    # 40 orientations to 16 classes: 39 / 2.5 = 15.6, 2 / 2.5 = 0.8, 3 / 2.5 = 1.2
    assert open_original("dsprites_ori", tmp_path).labels.tolist() == [0, 15, 0, 1]
    image = np.asarray(data.image(1))
    assert image.shape == (64, 64, 3) and set(np.unique(image)) == {0, 255}
    path = tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataFileError, match=r"\.npz' cannot be read"):
        open_original("dsprites_loc", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_smallnorb(tmp_path, packed):
    files.smallnorb(tmp_path, packed)
    data = open_original("smallnorb_azi", tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 15, 16]  # azimuths 0, 2, 4, 30, 32
    assert open_original("smallnorb_ele", tmp_path).labels.tolist() == [0, 1, 2, 0, 1]
    assert np.asarray(data.image(2)).max() == 80  # the left camera's
    assert len(data.source_files()) == 2


def test_broken_files_of_smallnorb(tmp_path):
    files.smallnorb(tmp_path)
    path = tmp_path / "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat"
    whole = path.read_bytes()
    for broken, reason in ((whole[:-1], "values for a matrix"), (b"MATLAB 5.0 MAT-file", "does not begin"), (b"", "")):
        path.write_bytes(broken)
        with pytest.raises(DataFileError, match=rf"training-dat\.mat' cannot be read.*{reason}"):
            open_original("smallnorb_azi", tmp_path)
    path.unlink()
    with pytest.raises(MissingDataError, match=r"training-dat\.mat[\s\S]*norb-v1\.0-small"):
        open_original("smallnorb_azi", tmp_path)
    (tmp_path / "a.mat").write_bytes(files.norb_matrix(np.arange(6, dtype=np.int32).reshape(3, 2)))
    assert read_norb(tmp_path / "a.mat").tolist() == [[0, 1], [2, 3], [4, 5]]


def test_camelyon_through_h5py(tmp_path, monkeypatch):
    """h5py is not among the requirements: a stand-in of it, on files of the published names."""
    contents = {}
    for split, count in (("train", 3), ("valid", 1), ("test", 2)):
        for kind, array in (("x", np.full((count, 4, 4, 3), count)), ("y", np.ones((count, 1, 1, 1)))):
            path = files.write(tmp_path / f"pcam/camelyonpatch_level_2_split_{split}_{kind}.h5", "")
            contents[str(path)] = {kind: array.astype(np.uint8)}
    with pytest.raises(MissingDataError, match=r"pip install h5py"):
        monkeypatch.setitem(sys.modules, "h5py", None)
        open_original("patch_camelyon", tmp_path)

    class File(dict):
        def __init__(self, path):
            super().__init__(contents[str(path)])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    fake = types.ModuleType("h5py")
    fake.File = File
    monkeypatch.setitem(sys.modules, "h5py", fake)
    data = pickle.loads(pickle.dumps(open_original("patch_camelyon", tmp_path)))
    assert len(data) == 6 and data.labels.tolist() == [1] * 6
    assert [int(np.asarray(data.image(i)).max()) for i in range(6)] == [3, 3, 3, 1, 2, 2]


def test_what_is_not_read_is_said(tmp_path):
    assert set(TASKS) - set(FORMATS) == {"diabetic_retinopathy", "dmlab"}
    with pytest.raises(ConfigError, match=r"published files of dmlab are not read here.*source: noah_jpeg"):
        open_original("dmlab", tmp_path)


@pytest.mark.parametrize("task", FORMATS)
def test_missing_files_say_what_to_download_and_where_to_put_it(tmp_path, task):
    for place in (None, tmp_path / "nothing", tmp_path):
        with pytest.raises(MissingDataError) as caught:
            open_original(task, place)
        text = str(caught.value)
        assert text.startswith(f"{task}: ") and FORMATS[task].download in text and "download=True" not in text
        assert all(f"FOLDER/{line}" in text for line in FORMATS[task].layout.splitlines())


# ---------------------------------------------------------------------- preparation
def lists(folder, train=(2, 0), val=(3,), test=(1, 3, 0), labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train800", train), ("val200", val), ("test", test)):
        words = [f"{n}\n" if labels is None else f"{n} {labels[n]}\n" for n in numbers]
        (folder / f"{split}.txt").write_text("".join(words))
    return folder


def prepare(task, tmp_path, name="kitti", **further):
    words = {
        "name": name,
        "originals": tmp_path / "published",
        "lists": tmp_path / "lists",
        "output": tmp_path / "vtab",
    }
    return run_task("petl", task, [f"{key}={value}" for key, value in (words | further).items()])


def test_png_copies_are_without_loss(tmp_path):
    assert {"vtab_png", "vtab_tensors", "fgvc_lists"} <= set(tasks("petl"))
    files.kitti(tmp_path / "published")
    lists(tmp_path / "lists", labels=[3, 0, 2, 1])
    text = prepare("vtab_png", tmp_path)
    assert "train800 2 (published: 800)" in text and "test 3 (published: 711)" in text
    data = VTAB1k(tmp_path / "vtab", "kitti", "train800val200", source="png", size=8, sizes="report")
    assert data.labels.tolist() == [2, 3, 1] and data.origin["lossy"] == 0.0
    for index, seed in enumerate((2, 0, 3)):
        assert np.array_equal(np.asarray(data.image(index)), files.pixels(seed))
    # Going on: what is there is left alone.
    kept = tmp_path / "vtab/kitti/images/test/000001.png"
    gone = tmp_path / "vtab/kitti/images/test/000002.png"
    before = kept.stat().st_mtime_ns
    gone.unlink()
    prepare("vtab_png", tmp_path)
    assert gone.is_file() and kept.stat().st_mtime_ns == before


def test_arrays_of_a_task(tmp_path):
    files.smallnorb(tmp_path / "published")
    lists(tmp_path / "lists")
    prepare("vtab_tensors", tmp_path, "smallnorb_azi")
    data = VTAB1k(tmp_path / "vtab", "smallnorb_azi", "test", source="tensors", size=8, sizes="report")
    assert data.labels.tolist() == [1, 15, 0]
    assert [int(np.asarray(data.image(i)).max()) for i in range(3)] == [40, 0, 0]
    assert not list((tmp_path / "vtab/smallnorb_azi").glob(".*"))


def test_images_of_several_sizes_make_no_array(tmp_path):
    files.kitti(tmp_path / "published")
    files.save(tmp_path / "published/training/image_2/000003.png", height=21)
    lists(tmp_path / "lists")
    with pytest.raises(DataFileError, match=r"image 3 of KITTI is 30 x 21, image 2 30 x 20.*vtab_png"):
        prepare("vtab_tensors", tmp_path)
    assert not (tmp_path / "vtab/kitti/images.npy").exists()


def test_lists_of_numbers_that_cannot_be_meant(tmp_path):
    files.kitti(tmp_path / "published")
    with pytest.raises(MissingDataError, match=r"train800\.txt.*number of an image a line"):
        prepare("vtab_png", tmp_path)
    for numbers, reason in (
        ((7,), r"asks for image 7, but KITTI has 4"),
        ((1, 1), "lists an image twice"),
        ((), "has no line"),
        (("images/a.jpg",), r"val200\.txt', line 1: expected `<index>`"),
    ):
        lists(tmp_path / "lists", val=numbers)
        with pytest.raises(DataFileError, match=reason):
            prepare("vtab_png", tmp_path)
    lists(tmp_path / "lists", labels=[0, 0, 0, 0])
    with pytest.raises(DataFileError, match=r"train800\.txt' gives image 2 of KITTI the class 0, the data set 2"):
        prepare("vtab_png", tmp_path)
    (tmp_path / "lists/test.txt").write_text("1\n2 2\n")
    with pytest.raises(DataFileError, match="classes in some lines only"):
        prepare("vtab_png", tmp_path)
    with pytest.raises(ConfigError, match="no task 'kiti'"):
        prepare("vtab_png", tmp_path, "kiti")


# ---------------------------------------------------------------------- lists of fine-grained releases
def birds(root):
    files.write(root / "images.txt", "1 001.Albatross/a 1.jpg\n2 002.Owl/b.jpg\n3 002.Owl/c.jpg\n")
    files.write(root / "image_class_labels.txt", "1 1\n2 2\n3 2\n")
    files.write(root / "train_test_split.txt", "1 1\n2 1\n3 0\n")


def flowers(root):
    savemat(files.write(root / "imagelabels.mat", ""), {"labels": [[5, 1, 9, 9]]})
    savemat(root / "setid.mat", {"trnid": [[2]], "valid": [[1]], "tstid": [[4, 3]]})


def boxed(texts):
    cells = np.empty((len(texts), 1), dtype=object)
    cells[:, 0] = texts
    return cells


def dogs(root):
    for split, names in (("train", ["n02085620-Chihuahua/n02085620_5927.jpg"]), ("test", ["n02116738-dhole/a.jpg"])):
        savemat(files.write(root / f"{split}_list.mat", ""), {"file_list": boxed(names), "labels": [[len(split)]]})


def cars(root):
    kind = [("bbox_x1", object), ("class", object), ("fname", object)]
    for file, rows in (("devkit/cars_train_annos.mat", [(1, 14, "00001.jpg")]),
                       ("cars_test_annos_withlabels.mat", [(1, 181, "00001.jpg"), (1, 103, "00002.jpg")])):  # fmt: skip
        savemat(files.write(root / file, ""), {"annotations": np.array(rows, dtype=kind)[None]})


EXPECTED = {
    "cub": {"train": {"001.Albatross/a 1.jpg": 1, "002.Owl/b.jpg": 2}, "test": {"002.Owl/c.jpg": 2}},
    "nabirds": {"train": {"001.Albatross/a 1.jpg": 1, "002.Owl/b.jpg": 2}, "test": {"002.Owl/c.jpg": 2}},
    "flowers": {
        "train": {"jpg/image_00002.jpg": 1}, "val": {"jpg/image_00001.jpg": 5},
        "test": {"jpg/image_00004.jpg": 9, "jpg/image_00003.jpg": 9},
    },
    "dogs": {"train": {"n02085620-Chihuahua/n02085620_5927.jpg": 5}, "test": {"n02116738-dhole/a.jpg": 4}},
    "cars": {"train": {"cars_train/00001.jpg": 14}, "test": {"cars_test/00001.jpg": 181, "cars_test/00002.jpg": 103}},
}  # fmt: skip
MAKERS = {"cub": birds, "nabirds": birds, "flowers": flowers, "dogs": dogs, "cars": cars}


@pytest.mark.parametrize("name", EXPECTED)
def test_lists_of_fgvc_from_the_release(tmp_path, name):
    root = tmp_path / name
    root.mkdir()
    with pytest.raises(MissingDataError, match=f"{name}: .*root=FOLDER is the unpacked release"):
        run_task("petl", "fgvc_lists", [f"name={name}", f"root={root}"])
    MAKERS[name](root)
    text = run_task("petl", "fgvc_lists", [f"name={name}", f"root={root}"])
    assert "published" in text
    for split, expected in EXPECTED[name].items():
        assert json.loads((root / f"{split}.json").read_text()) == expected
    assert (root / "val.json").exists() == (name == "flowers")
    if name == "flowers":
        for number in (1, 2, 3, 4):
            files.save(root / f"jpg/image_{number:05d}.jpg")
        assert FGVC(tmp_path, name, "test", size=8, sizes="report").labels.tolist() == [2, 2]


def test_broken_files_of_a_release_are_named(tmp_path):
    root = tmp_path / "cub"
    birds(root)
    (root / "train_test_split.txt").write_text("1 1\n")
    with pytest.raises(DataFileError, match=r"image 2 of images\.txt has no class or split"):
        run_task("petl", "fgvc_lists", ["name=cub", f"root={root}"])
    (root / "train_test_split.txt").write_text("1\n")
    with pytest.raises(DataFileError, match=r"train_test_split\.txt', line 1"):
        run_task("petl", "fgvc_lists", ["name=cub", f"root={root}"])
    flowers(tmp_path / "flowers")
    savemat(tmp_path / "flowers/setid.mat", {"trnid": [[2]], "valid": [[1]], "tstid": [[5]]})
    with pytest.raises(DataFileError, match=r"setid\.mat' does not belong"):
        run_task("petl", "fgvc_lists", ["name=flowers", f"root={tmp_path / 'flowers'}"])
    savemat(tmp_path / "flowers/setid.mat", {"trnid": [[2]]})
    with pytest.raises(DataFileError, match="no variable 'valid'"):
        run_task("petl", "fgvc_lists", ["name=flowers", f"root={tmp_path / 'flowers'}"])
    (tmp_path / "flowers/setid.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(DataFileError, match=r"setid\.mat"):
        run_task("petl", "fgvc_lists", ["name=flowers", f"root={tmp_path / 'flowers'}"])
