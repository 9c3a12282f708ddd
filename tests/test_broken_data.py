"""Every paper's readers of lists and annotations: a broken file is an error of ours that names it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import DataFileError
from core.errors import VitrineError

LATIN = "grün 1 2 3 4\n".encode("latin-1")


def _picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def _stvit_ade20k(root):
    from stvit.data.ade20k import ADE20K

    _picture(root / "images/training/a.png")
    with open(bytes(root / "images/training") + b"/gr\xfcn.png", "wb"):
        pass
    return lambda: ADE20K(root), DataFileError, r"gr\\xfcn\.png' is not UTF-8"


def _birds(root):
    from slot_walks.data import Birds

    (root / "images.txt").write_bytes(LATIN)
    return lambda: Birds(root), DataFileError, r"images\.txt' is not UTF-8"


def _birds_boxes(root):
    from slot_walks.data import Birds

    for name, line in (("images", "1 a.jpg"), ("bounding_boxes", "1 a b c d"), ("train_val_test_split", "1 0")):
        (root / f"{name}.txt").write_text(line, encoding="utf-8-sig")
    return lambda: Birds(root), DataFileError, r"bounding_boxes\.txt' cannot be read: could not convert"


def _dogs(root):
    from slot_walks.data import Dogs

    np.savez(root / "several.npz", a=np.arange(3), b=np.arange(3))
    (root / "several.npz").rename(root / "data_tr_sel.npy")
    return lambda: Dogs(root), DataFileError, r"data_tr_sel\.npy' cannot be read"


def _flowers(root):
    from slot_walks.data import Flowers

    (root / "jpg").mkdir()
    (root / "setid.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    return lambda: Flowers(root), DataFileError, r"setid\.mat"


def _voc(root):
    from slot_walks.data import VOC

    base = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "SegmentationClassAug"):
        (base / name).mkdir(parents=True)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name in ("train", "trainaug", "val"):
        (lists / f"{name}.txt").write_bytes(LATIN)
    return lambda: VOC(root, "val"), DataFileError, r"val\.txt' is not UTF-8"


def _coco(root):
    from slot_walks.data import COCO

    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    content = {"images": [{"id": 1}], "annotations": [], "categories": []}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return lambda: COCO(root, "val"), DataFileError, r"instances_val2017\.json': file_name of images\[0\] is missing"


def _movi(root):
    from slot_walks.data import MOVi

    (root / "C/train/rgb").mkdir(parents=True)
    (root / "C/train/rgb/0").symlink_to(root / "C/train/rgb/0")
    return lambda: MOVi(root), DataFileError, r"rgb/0' cannot be read"


def _tfrecord(root):
    from slot_walks.data.tfrecord import read_records

    (root / "a.tfrecord").write_bytes(bytes(40))
    return lambda: list(read_records(root / "a.tfrecord")), DataFileError, r"a\.tfrecord"


def _ffhq_list(root):
    from seqgan.data import FFHQ

    _picture(root / "00000.png")
    (root / "list.txt").write_bytes(LATIN)
    return lambda: FFHQ(root, count=None, list_file=root / "list.txt"), DataFileError, r"list\.txt' is not UTF-8"


def _ffhq_loop(root):
    from seqgan.data import FFHQ

    _picture(root / "00000.png")
    (root / "again").symlink_to(root)
    return lambda: FFHQ(root, count=None, split="all"), DataFileError, "again' is a link to a folder"


def _lsun_loop(root):
    from seqgan.data import LSUN

    _picture(root / "church_outdoor_train/1.png")
    (root / "church_outdoor_train/again").symlink_to(root / "church_outdoor_train")
    return lambda: LSUN(root, storage="folder"), DataFileError, "again' is a link to a folder"


def _lmdb(root):
    from seqgan.data import LSUN

    (root / "church_outdoor_train_lmdb").mkdir()
    (root / "church_outdoor_train_lmdb/data.mdb").write_bytes(bytes(10_000))
    return lambda: LSUN(root), VitrineError, r"data\.mdb"


def _statistics(root):
    from core.metrics.frechet import read_statistics

    (root / "a.npz").write_bytes(b"PK\x03\x04")
    return lambda: read_statistics(root / "a.npz"), DataFileError, r"a\.npz' cannot be read.*mu and sigma"


def _request(root):
    from seqgan.inference.files import SampleRequest, read_request

    (root / "a.json").write_bytes(LATIN)
    return lambda: read_request(root / "a.json", SampleRequest()), DataFileError, r"a\.json' is not UTF-8"


def _captions(root):
    from tune_a_video.data import ClipFolder

    _picture(root / "clip/0.png")
    (root / "captions.txt").write_bytes(LATIN)
    return lambda: ClipFolder(root, root / "captions.txt"), DataFileError, r"captions\.txt' is not UTF-8"


def _captions_json(root):
    from tune_a_video.data import ClipFolder

    _picture(root / "clip/0.png")
    (root / "captions.json").write_text('{"clip": ')
    return lambda: ClipFolder(root, root / "captions.json"), DataFileError, r"captions\.json' cannot be read"


def _davis(root):
    from tune_a_video.data import DAVIS

    _picture(root / "JPEGImages/480p/bear/0.png")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_bytes(LATIN)
    return lambda: DAVIS(root, "val"), DataFileError, r"val\.txt' is not UTF-8"


def _tgve(root):
    from tune_a_video.data.tgve import read_table

    (root / "inside").mkdir()
    (root / "LOVEU-TGVE-2023_Dataset.csv").write_bytes(LATIN)
    return lambda: read_table(root / "inside"), DataFileError, r"\.csv' is not UTF-8"


def _pipeline(root):
    from tune_a_video.interop.folders import _index

    (root / "model_index.json").write_text("[]")
    return lambda: _index(root), DataFileError, r"model_index\.json' holds a list"


def _pipeline_pickle(root):
    from tune_a_video.interop.folders import check_pickles

    (root / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return lambda: check_pickles(root), VitrineError, r"pytorch_model\.bin' is a Git LFS pointer"


def _network(root):
    import tune_a_video.interop.folders  # noqa: F401  hands over the engine's reader
    from tune_a_video.models.weights import read_network

    (root / "config.json").write_text("{}")
    (root / "pytorch_model.bin").write_bytes(b"\x80\x02)" + b"2\x86" * 60 + b"N\x86.")
    return lambda: read_network(root), VitrineError, r"pytorch_model\.bin"


def _network_config(root):
    from tune_a_video.models.weights import read_config

    (root / "config.json").write_bytes(LATIN)
    return lambda: read_config(root), ValueError, r"config\.json is not whole JSON"


def _backbone(root):
    import slot_walks.trainer.slots  # noqa: F401  hands over the engine's reader
    from slot_walks.models.weights import read_backbone

    (root / "dino.pth").write_bytes(b"<!DOCTYPE html>")
    return lambda: read_backbone(torch.nn.Linear(1, 1), root / "dino.pth"), VitrineError, r"dino\.pth' is a web page"


def _flax(root):
    from seqgan.checkpoint.msgpack import read_flax

    (root / "a.msgpack").write_bytes(b"\xdf\xff\xff\xff\xff")
    return lambda: read_flax(root / "a.msgpack"), VitrineError, r"a\.msgpack' is damaged"


READERS = [value for name, value in list(globals().items()) if name.startswith("_") and callable(value)]
READERS = [value for value in READERS if value is not _picture]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__.strip("_"))
def test_a_broken_file_is_named(tmp_path, reader):
    read, kind, reason = reader(tmp_path)
    with pytest.raises(kind, match=reason) as caught:
        read()
    assert "weights_only" not in str(caught.value)


def test_lists_with_a_mark_are_read_right(tmp_path):
    from seqgan.data import FFHQ
    from tune_a_video.data import ClipFolder

    _picture(tmp_path / "faces/00000.png")
    (tmp_path / "list.txt").write_text("00000.png\n", encoding="utf-8-sig")
    assert FFHQ(tmp_path / "faces", count=None, list_file=tmp_path / "list.txt").files == ["00000.png"]
    _picture(tmp_path / "clips/bär/0.png")
    (tmp_path / "captions.txt").write_text("bär ein Bär\n", encoding="utf-16")
    assert ClipFolder(tmp_path / "clips", tmp_path / "captions.txt").captions == ["ein Bär"]


def test_backbones_and_networks_without_the_engine_give_no_advice_of_torch(tmp_path, monkeypatch):
    from core.layers import weight_files
    from slot_walks.models import weights as backbones
    from tune_a_video.models import weights as networks

    monkeypatch.setattr(weight_files, "read_file", weight_files.plain_read)
    out = io.BytesIO()
    torch.save({"w": print}, out)
    (tmp_path / "a.bin").write_bytes(out.getvalue())
    for read in (
        lambda: backbones.read_backbone(torch.nn.Linear(1, 1), tmp_path / "a.bin"),
        lambda: networks.read_tensors(tmp_path / "a.bin"),
    ):
        with pytest.raises(ValueError, match=r"a\.bin is damaged, or not a file of weights") as caught:
            read()
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
