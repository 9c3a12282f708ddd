"""Checkpoint files: whole or not at all on writing, data or nothing on reading."""

from __future__ import annotations

import os
import pickle
import stat
import textwrap
from collections import OrderedDict

import numpy as np
import pytest
import torch

from core.checkpoint import CheckpointReadError, CheckpointWriteError, UnsafeCheckpointError, load, save_atomic
from tests import forked


def _state() -> dict:
    return {
        "model": OrderedDict(weight=torch.arange(6.0).reshape(2, 3), steps=torch.tensor(3)),
        "numbers": [1, 2.5, None, True, (4, "five"), {6}],
        "bytes": b"\x00\xff",
        "size": torch.Size([1, 2]),
        7: {"dtype": torch.float16, "device": torch.device("cpu")},
    }


def test_what_is_saved_is_read_back_safely(tmp_path):
    path = tmp_path / "new" / "folder" / "a.pt"
    record = save_atomic(_state(), path)
    loaded = load(path)
    assert torch.equal(loaded["model"]["weight"], _state()["model"]["weight"])
    assert {k: v for k, v in loaded.items() if k != "model"} == {k: v for k, v in _state().items() if k != "model"}
    assert record.size == path.stat().st_size
    assert record == type(record).of(path)
    assert os.listdir(path.parent) == ["a.pt"]


def test_a_new_file_has_ordinary_rights_and_a_replaced_one_keeps_its_own(tmp_path):
    path = tmp_path / "a.pt"
    umask = os.umask(0o022)
    try:
        save_atomic({"a": 1}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o640)
        save_atomic({"a": 2}, path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert load(path) == {"a": 2}


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"rng": [0, np.zeros(2)]}, r"state\['rng'\]\[1\] is a numpy.ndarray"),
        ({"a": {"f": print}}, r"state\['a'\]\['f'\]"),
        ({"p": stat}, "state"),
        ({"s": torch.nn.Linear(1, 1)}, "Linear"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, value, place):
    path = tmp_path / "a.pt"
    save_atomic({"old": 1}, path)
    with pytest.raises(TypeError, match=place):
        save_atomic(value, path)
    assert load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_numpy_scalars_become_numbers(tmp_path):
    save_atomic({"best": np.float64(0.5), "list": [np.int64(3)], np.str_("key"): 1}, tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt")
    assert loaded == {"best": 0.5, "list": [3], "key": 1}
    assert type(loaded["best"]) is float


def test_safetensors_round_trip_with_shared_and_strided_tensors(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    state = {"a": shared, "tied": shared, "part": shared[:, 1], "half": torch.ones(2, dtype=torch.bfloat16)}
    save_atomic(state, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in state.items())
    with pytest.raises(TypeError, match="'epoch' is a int"):
        save_atomic({"epoch": 3}, tmp_path / "b.safetensors")


def test_npz_is_read_as_tensors_and_pickled_objects_in_it_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{"block/kernel": np.arange(4.0, dtype=np.float32)})
    assert torch.equal(load(tmp_path / "a.npz")["block/kernel"], torch.arange(4.0))
    np.savez(tmp_path / "b.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(UnsafeCheckpointError, match="pickled Python objects"):
        load(tmp_path / "b.npz")


FULL_DISK = textwrap.dedent(
    """
    import os, resource, sys, torch
    from core.checkpoint import CheckpointStore, CheckpointWriteError, load, save_atomic
    folder, suffix, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    path = os.path.join(folder, "a" + suffix)
    save_atomic({"w": torch.ones(10)}, path)
    store = CheckpointStore(os.path.join(folder, "store"), keep_last=1)
    store.save({"w": torch.ones(10)}, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    big = {f"w{i}": torch.zeros(1 << 16) for i in range(16)}
    for write in (lambda: save_atomic(big, path), lambda: store.save(big, 2)):
        try:
            write()
        except CheckpointWriteError as error:
            print(error)
        else:
            sys.exit("the write went through")
    assert torch.equal(load(path)["w"], torch.ones(10))
    assert store.newest() == store.path(1) and store.steps() == [1]
    assert sorted(os.listdir(folder)) == ["a" + suffix, "store"], os.listdir(folder)
    assert sorted(os.listdir(store.folder)) == ["index.json", "step_00000001.pt"], os.listdir(store.folder)
    """
)


@pytest.mark.child
@pytest.mark.parametrize(("suffix", "limit"), [(".pt", 1 << 20), (".pt", 1 << 12), (".safetensors", 1 << 20)])
def test_a_full_disk_leaves_the_previous_file_and_says_so(tmp_path, suffix, limit):
    script = tmp_path / "script" / "full_disk.py"
    script.parent.mkdir()
    script.write_text(FULL_DISK)
    folder = tmp_path / "disk"
    folder.mkdir()
    ran = forked.run([str(script), str(folder), suffix, str(limit)], tmp_path, dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("could not write") == 2
    for part in (f"a{suffix}", "File too large", "4.2 MB", "are free", "the previous file is untouched"):
        assert part in ran.stdout, ran.stdout


def test_a_disk_without_space_is_reported_with_its_reason(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_atomic({"old": 1}, path)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        save_atomic({"new": 1}, path)
    assert load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_an_interrupt_while_writing_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_atomic({"old": 1}, path)

    def interrupted(state: object, file: object) -> None:
        file.write(b"half of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_atomic({"new": 1}, path)
    assert load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_bytes_reach_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (events.append("sync"), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    save_atomic({"a": 1}, tmp_path / "a.pt")
    assert events == ["sync", "rename", "sync"]


class _Config:
    pass


def test_a_file_that_needs_more_than_data_is_refused_by_name(tmp_path):
    torch.save({"model": {}, "args": _Config()}, tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"_Config'.*load_official\(path\).*allow="):
        load(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsafeCheckpointError, match="load_official"):
        load(tmp_path / "b.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "c.pt")
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        load(tmp_path / "c.pt")


def test_missing_and_damaged_files_are_explained(tmp_path):
    path = tmp_path / "checkpoint_best.pt"
    save_atomic({"a": torch.zeros(1000)}, path)
    with pytest.raises(CheckpointReadError, match=r"near names there: checkpoint_best\.pt"):
        load(tmp_path / "checkpont_best.pt")
    with pytest.raises(CheckpointReadError, match="its folder does not exist"):
        load(tmp_path / "no" / "a.pt")
    for size in (0, 100, path.stat().st_size - 30):
        (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointReadError, match=r"cut\.pt"):
            load(tmp_path / "cut.pt")
    for suffix in (".safetensors", ".npz"):
        (tmp_path / f"cut{suffix}").write_bytes(b"PK\x03\x04 nothing of the kind")
        with pytest.raises(CheckpointReadError, match=f"cut{suffix}"):
            load(tmp_path / f"cut{suffix}")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointReadError, match="holds a list"):
        load(tmp_path / "list.pt")
