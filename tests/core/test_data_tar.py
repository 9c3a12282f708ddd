"""Tar shards: random access, the webdataset library's own files, kept indices."""

import io
import json
import os
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from core.data import DataFileError, MissingDataError, SampleError, SeededDataset, TarShards, build_loader
from core.data import tar as tar_module


def write_shards(folder, shards=3, samples=4):
    """Shards as the webdataset library writes them."""
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"set-{shard:04d}.tar")) as writer:
            for sample in range(samples):
                number = shard * samples + sample
                writer.write(
                    {
                        "__key__": f"{sample:06d}",
                        "png": np.full((4, 5, 3), number, np.uint8),
                        "cls": number % 2,
                        "txt": f"caption {number}",
                        "json": {"number": number},
                        "npy": np.arange(3) + number,
                        "latent.bin": bytes([number]),
                    }
                )
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


def test_shards_of_the_webdataset_library_are_read(shards):
    data = TarShards("set-{0000..0002}.tar", root=shards)
    assert len(data) == 12
    for number in (7, 0, 11, 3):
        sample = data[number]
        assert sample["sample_id"] == f"set-{number // 4:04d}/{number % 4:06d}"
        assert np.array(sample["png"]).tolist() == np.full((4, 5, 3), number).tolist()
        assert (sample["cls"], sample["txt"], sample["json"]) == (number % 2, f"caption {number}", {"number": number})
        assert sample["npy"].tolist() == [number, number + 1, number + 2]
        assert sample["latent.bin"] == bytes([number])
    assert data[-1]["sample_id"] == data[11]["sample_id"]
    with pytest.raises(IndexError):
        data[12]


def test_samples_are_those_that_the_library_streams(shards):
    urls = [str(shards / f"set-{i:04d}.tar") for i in range(3)]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    data = TarShards(urls)
    assert len(streamed) == len(data)
    for theirs, ours in zip(streamed, (data[i] for i in range(len(data))), strict=True):
        assert np.array_equal(np.array(theirs["png"].convert("RGB")), np.array(ours["png"]))
        assert (theirs["cls"], theirs["txt"], theirs["json"]) == (ours["cls"], ours["txt"], ours["json"])
        assert ours["sample_id"].endswith(theirs["__key__"])


def test_fields_choose_rename_and_transform(shards):
    data = TarShards(
        "set-*.tar",
        root=shards,
        fields={"image": "jpg; png", "label": "cls"},
        transforms={"image": lambda image: torch.tensor(np.array(image)[0, 0, 0])},
    )
    assert data[5].keys() == {"image", "label", "sample_id"} and data[5]["image"] == 5 and data[5]["label"] == 1
    with pytest.raises(KeyError, match=r"set-0000.tar: 000000 has no jpg or gif .it has .*cls.*png"):
        TarShards("set-*.tar", root=shards, fields={"image": "jpg;gif"})[0]
    with pytest.raises(ValueError, match="transforms for \\['picture'\\]"):
        TarShards("set-*.tar", root=shards, fields={"image": "png"}, transforms={"picture": str})
    assert isinstance(TarShards("set-*.tar", root=shards, fields={"label": "cls"}, decode=False)[1]["label"], bytes)


def test_only_the_fields_that_are_asked_for_are_read(shards, monkeypatch):
    data = TarShards("set-*.tar", root=shards, fields={"label": "cls"})
    sizes = []
    read = data._pool.read
    monkeypatch.setattr(data._pool, "read", lambda path, offset, size: sizes.append(size) or read(path, offset, size))
    assert data[9]["label"] == 1
    assert sizes == [1]


@pytest.mark.child
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_divide_the_samples_exactly(shards, workers):
    data = TarShards("set-*.tar", root=shards, fields={"label": "cls"})
    seen = Counter()
    for rank in range(5):
        cfg = {"dataset": data, "batch_size": 2, "num_workers": workers}
        for batch in build_loader(cfg, seed=0, training=False, rank=rank, world_size=5):
            seen.update(batch.data["sample_id"])
    assert len(seen) == 12 and set(seen.values()) == {1}


def test_the_kept_index_is_used_until_its_shard_changes(shards, monkeypatch):
    first = TarShards("set-*.tar", root=shards)
    assert sorted(path.name for path in shards.glob("*.npz")) == [f"set-000{i}.tar.index.npz" for i in range(3)]
    built = []
    build = tar_module._build_index
    monkeypatch.setattr(tar_module, "_build_index", lambda shard: built.append(os.path.basename(shard)) or build(shard))
    again = TarShards("set-*.tar", root=shards)
    assert not built and again[6]["txt"] == first[6]["txt"] and again.extensions(6) == first.extensions(6)
    write_shards(shards, shards=1, samples=5)
    changed = TarShards("set-*.tar", root=shards)
    assert built == ["set-0000.tar"] and len(changed) == 13 and changed[4]["txt"] == "caption 4"
    (shards / "set-0001.tar.index.npz").write_bytes(b"broken")
    assert TarShards("set-*.tar", root=shards)[12]["txt"] == "caption 11" and built[1:] == ["set-0001.tar"]


def test_the_index_goes_to_a_folder_or_nowhere(shards, tmp_path):
    TarShards("set-*.tar", root=shards, index_folder=None)
    assert not list(tmp_path.rglob("*.npz"))
    TarShards("set-*.tar", root=shards, index_folder=tmp_path / "indices")
    assert len(list((tmp_path / "indices").glob("*.npz"))) == 3 and not list(shards.glob("*.npz"))


def test_an_index_that_cannot_be_kept_is_no_error(shards, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert len(TarShards("set-*.tar", root=shards, index_folder=tmp_path / "file")) == 12


def add(archive, name, data=b"1"):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_members_are_grouped_by_name_wherever_they_lie(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "dir/a.cls", b"3")
        add(archive, "b.CLS", b"4")
        add(archive, "dir/a.seg.json", json.dumps([1]).encode())
        add(archive, "__meta.json__", b"{}")
        add(archive, "README")
        add(archive, ".hidden", b"x")
        add(archive, "very/long/" + "x" * 200 + ".txt", b"long")
        archive.addfile(tarfile.TarInfo("dir/b.link"), None)
    data = TarShards(str(path), index_folder=None)
    assert [data[i]["sample_id"] for i in range(2)] == ["odd/dir/a", "odd/b"]
    assert data[0]["cls"] == 3 and data[0]["seg.json"] == [1] and data[1]["cls"] == 4
    assert data[2]["txt"] == "long"


def test_mistakes_in_shards_are_named(shards, tmp_path):
    with pytest.raises(MissingDataError, match=r"(?s)2 of 5 are not there, .*set-0003.tar'.*_dataloader.dataset.urls"):
        TarShards("set-{0000..0004}.tar", root=shards)
    with pytest.raises(MissingDataError, match="are not there"):
        TarShards("other-*.tar", root=shards)
    with pytest.raises(MissingDataError, match="named twice"):
        TarShards(["set-0000.tar", "set-{0000..0001}.tar"], root=shards)
    with tarfile.open(shards / "z.tar", "w:gz") as archive:
        add(archive, "a.cls")
    with pytest.raises(DataFileError, match=r"z.tar' cannot be read: .*should be an uncompressed tar file: unpack"):
        TarShards("z.tar", root=shards)
    with tarfile.open(shards / "twice.tar", "w") as archive:
        add(archive, "a.cls"), add(archive, "a.cls")
    with pytest.raises(MissingDataError, match=r"'a.cls' is in the shard twice"):
        TarShards("twice.tar", root=shards)
    with tarfile.open(shards / "empty.tar", "w") as archive:
        add(archive, "README")
    with pytest.raises(MissingDataError, match="holds no samples"):
        TarShards("empty.tar", root=shards)


def test_a_broken_member_is_an_error_that_names_it(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "k1.png", b"no image")
        add(archive, "k2.png", _png())
    data = SeededDataset(TarShards(str(tmp_path / "a.tar")))
    with pytest.raises(SampleError, match=r"TarShards\[0\] \(.*k1\): DataFileError: cannot decode .*a.tar: k1.png"):
        data[0]
    size = os.path.getsize(tmp_path / "a.tar")
    shards = TarShards(str(tmp_path / "a.tar"))
    os.truncate(tmp_path / "a.tar", 1600)
    assert size > 1600
    with pytest.raises(OSError, match=r"a.tar ends \d+ bytes early"):
        shards[1]


def test_pickles_are_never_opened(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "k.pkl", pickle.dumps([1]))
        add(archive, "k.pth", b"weights")
        add(archive, "l.npy", _npy(np.array([print], dtype=object)))
    data = TarShards(str(tmp_path / "a.tar"))
    assert data[0]["pkl"] == pickle.dumps([1]) and data[0]["pth"] == b"weights"
    with pytest.raises(ValueError, match="allow_pickle"):
        data[1]


def test_open_files_are_limited_and_not_pickled(tmp_path):
    write_shards(tmp_path, shards=5, samples=1)
    data = TarShards("set-*.tar", root=tmp_path, fields={"label": "cls"})
    data._pool.limit = 2
    for _ in range(2):
        assert [data[i]["label"] for i in range(5)] == [0, 1, 0, 1, 0]
        assert len(data._pool._open) == 2
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._pool._open and copy[3]["label"] == 1


def _png():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
