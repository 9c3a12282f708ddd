"""The decoded training set: the same samples, kept by their origin, filled in parts."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from core.data import build_loader, seed_sample
from core.errors import ConfigError
from petl.data import DecodedStore, VTAB1k
from petl.data import store as module
from petl.data.listed import ListedImages
from tests.petl import data_files as files


def data(root, **further):
    return VTAB1k(root, "svhn", "train800val200", **{"size": 8, "sizes": "report", **further})


@pytest.mark.parametrize("aug", ["none", "rand"])
def test_samples_are_those_of_the_data_set_bit_for_bit(tmp_path, aug):
    own = data(files.vtab(tmp_path, "svhn"), aug=aug)
    stored = DecodedStore(own, tmp_path / "store")
    assert len(stored) == len(own) == 6
    for index in range(6):
        seed_sample(index)
        expected = own[index]
        seed_sample(index)
        sample = stored[index]
        assert sample["label"] == expected["label"] and sample["sample_id"] == expected["sample_id"]
        assert torch.equal(sample["image"], expected["image"])
    assert stored.num_classes == 10 and stored.origin == own.origin and stored.describe(1) == own.describe(1)


def test_raw_pixels_are_normalised_by_the_batch(tmp_path):
    own = data(files.vtab(tmp_path, "svhn"))
    raw = DecodedStore(own, tmp_path / "store", raw=True)
    batch = torch.stack([raw[index]["image"] for index in range(6)])
    assert batch.dtype == torch.uint8
    assert torch.equal(own.transform.normalise(batch), torch.stack([own[index]["image"] for index in range(6)]))
    with pytest.raises(ConfigError, match="raw=true leaves augmentation out, but aug=rand"):
        DecodedStore(data(tmp_path, aug="rand"), tmp_path / "store", raw=True)


def test_images_are_decoded_once(tmp_path, monkeypatch):
    own = data(files.vtab(tmp_path, "svhn"))
    decoded = []
    image = ListedImages.image
    monkeypatch.setattr(ListedImages, "image", lambda self, index: decoded.append(index) or image(self, index))
    stored = DecodedStore(own, tmp_path / "store")
    for _ in range(2):
        [stored[index] for index in range(6)]
    DecodedStore(own, tmp_path / "store")
    assert decoded == [0, 1, 2, 3, 4, 5]


def test_an_interrupted_store_goes_on(tmp_path, monkeypatch):
    own = data(files.vtab(tmp_path, "svhn"))
    whole = DecodedStore(own, tmp_path / "whole")
    image = ListedImages.image

    def fails(self, index):
        if index == 4:
            raise KeyboardInterrupt
        return image(self, index)

    monkeypatch.setattr(
        module, "DataLoader", lambda data, size, **further: torch.utils.data.DataLoader(data, 2, **further)
    )
    monkeypatch.setattr(ListedImages, "image", fails)
    with pytest.raises(KeyboardInterrupt):
        DecodedStore(own, tmp_path / "store")
    decoded = []
    monkeypatch.setattr(ListedImages, "image", lambda self, index: decoded.append(index) or image(self, index))
    stored = DecodedStore(own, tmp_path / "store")
    assert decoded == [4, 5]
    assert all(torch.equal(stored[i]["image"], whole[i]["image"]) for i in range(6))


def test_other_files_sizes_and_interpolations_have_a_store_of_their_own(tmp_path):
    files.vtab(tmp_path, "svhn")
    folder = tmp_path / "store"
    first = DecodedStore(data(tmp_path), folder)
    DecodedStore(data(tmp_path, norm="inception"), folder)  # the same pixels
    DecodedStore(data(tmp_path, aug="rand"), folder)
    assert len(os.listdir(folder)) == 1
    DecodedStore(data(tmp_path, size=10), folder)
    DecodedStore(data(tmp_path, interpolation="bilinear"), folder)
    assert len(os.listdir(folder)) == 3
    files.save(tmp_path / "svhn/images/train800val200/000003.jpg", seed=99)
    changed = DecodedStore(data(tmp_path), folder)
    assert len(os.listdir(folder)) == 4 and not torch.equal(changed[3]["image"], first[3]["image"])
    path = tmp_path / "svhn/train800val200.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    swapped = DecodedStore(data(tmp_path), folder)
    assert len(os.listdir(folder)) == 5 and torch.equal(swapped[0]["image"], changed[5]["image"])


def test_other_rows_of_one_array_have_a_store_of_their_own(tmp_path):
    folder = tmp_path / "svhn"
    folder.mkdir()
    np.save(folder / "images.npy", np.stack([files.pixels(i, 9, 9) for i in range(4)]))
    stored = {}
    for rows in ("0 1\n2 1\n", "3 1\n1 1\n"):
        (folder / "train800val200.txt").write_text(rows)
        own = data(tmp_path, source="tensors")
        stored[rows] = DecodedStore(own, tmp_path / "store")
        assert torch.equal(stored[rows][1]["image"], own[1]["image"])
    assert len(os.listdir(tmp_path / "store")) == 2


def test_random_crops_and_foreign_data_cannot_be_kept(tmp_path):
    files.vtab(tmp_path, "svhn")
    with pytest.raises(ConfigError, match="aug=simple crops at random"):
        DecodedStore(data(tmp_path, aug="simple"), tmp_path / "store")
    with pytest.raises(ConfigError, match="VTAB1k with function cannot be kept"):
        DecodedStore(data(tmp_path, transform=lambda image: torch.zeros(3, 8, 8)), tmp_path / "store")
    with pytest.raises(ConfigError, match="Dataset with NoneType"):
        DecodedStore(Dataset(), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_loaders_and_worker_processes_take_a_store(tmp_path):
    own = data(files.vtab(tmp_path, "svhn"))
    stored = DecodedStore(own, tmp_path / "store")
    again = pickle.loads(pickle.dumps(stored))
    assert torch.equal(again[2]["image"], own[2]["image"])
    batches = [
        [fetched.data for fetched in build_loader({"dataset": each, "batch_size": 3}, seed=0, training=True)]
        for each in (own, stored)
    ]
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["label"], theirs["label"])


def test_a_config_builds_a_store_around_a_data_set(tmp_path):
    from core.config.registry import build

    root = files.vtab(tmp_path, "svhn")
    inner = {"type": "petl.data.VTAB1k", "root": str(root), "task": "svhn", "size": 8, "sizes": "report"}
    stored = build({"type": "petl.data.DecodedStore", "folder": str(tmp_path / "store"), "dataset": inner})
    assert isinstance(stored, DecodedStore) and stored[0]["image"].shape == (3, 8, 8)
