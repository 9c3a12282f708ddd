"""Hostile and broken weight files: refused in one line, whatever reads them, and nothing in them is executed."""

from __future__ import annotations

import gc
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from core.checkpoint import CheckpointReadError, CheckpointStore, UnsafeCheckpointError, load, load_official
from core.checkpoint.limits import Budget
from tests.hostile.builders import (
    call,
    pickled,
    saved,
    storage,
    swollen,
    tensor,
    torch_zip,
    weights,
)
from tests.hostile.files import FILES, _colliding_pairs, colliding
from tests.hostile.readers import ROOT

_READ = {"load": load, "load_official": load_official}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, name):
    hostile = FILES[name]
    path, mark = tmp_path / f"weights{hostile.suffix}", tmp_path / "mark"
    hostile.write(path, mark)
    for reader in _READ.keys() & set(hostile.readers):
        with pytest.raises(CheckpointReadError) as caught:
            _READ[reader](path)
        message = str(caught.value)
        assert message.isprintable() and hostile.reason in message and "weights" in message
        assert "weights_only" not in message and "allow_pickle" not in message
    assert not mark.exists() and gc.isenabled()


def test_there_are_a_hundred_of_them():
    assert len(FILES) >= 100 and sum(len(hostile.readers) > 2 for hostile in FILES.values()) >= 100


def test_the_colliding_keys_do_collide():
    assert colliding(_colliding_pairs(100))


def test_the_command_counts_refusals():
    words = ["--no-record", "a pipe", "a shell command in a torch file"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.hostile", *words], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 files, 2 refused in one line by every reader, 0 executed something" in ran.stdout


# --- what is unusual, but a checkpoint all the same ------------------------------------------------------------------


def test_one_tensor_under_many_names_is_read_and_shared(tmp_path):
    one = torch.arange(100_000.0)
    state = {f"layers.{i}.weight": one for i in range(500)}
    (tmp_path / "a.pt").write_bytes(saved(state))
    loaded = load(tmp_path / "a.pt")
    assert len({value.data_ptr() for value in loaded.values()}) == 1 and torch.equal(loaded["layers.7.weight"], one)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_many_small_tensors_are_read(tmp_path, form):
    state = {f"step.{i}": torch.tensor(float(i)) for i in range(12_000)}
    (tmp_path / "a.pt").write_bytes(saved(state, form))
    assert load(tmp_path / "a.pt")["step.11999"] == 11_999


def test_small_expanded_tensors_deflated_entries_and_foreign_names_are_read(tmp_path):
    expanded = torch.arange(4.0).expand(1000, 4)
    (tmp_path / "a.bin").write_bytes(saved({"e": expanded}))
    assert torch.equal(load(tmp_path / "a.bin")["e"], expanded) and load(tmp_path / "a.bin")["e"].stride() == (0, 1)
    (tmp_path / "b.pt").write_bytes(torch_zip(weights(tensor()), compression=zipfile.ZIP_DEFLATED))
    assert torch.equal(load(tmp_path / "b.pt")["w0"], torch.zeros(4))
    np.savez_compressed(tmp_path / "c.npz", big=np.arange(6, dtype=">f4").reshape(2, 3), f=np.ones((2, 3), order="F"))
    (tmp_path / "c.npz").rename(tmp_path / "c.ckpt")
    loaded = load(tmp_path / "c.ckpt")
    assert torch.equal(loaded["big"], torch.arange(6.0).reshape(2, 3)) and loaded["f"].shape == (2, 3)


def test_keys_of_numbers_and_tuples_are_read(tmp_path):
    state = {(i, "scale"): i for i in range(1000)} | dict.fromkeys(range(1 << 40, (1 << 40) + 5000)) | {1.5: 0, (): 1}
    (tmp_path / "a.pkl").write_bytes(saved(state, 2))
    assert load_official(tmp_path / "a.pkl") == state


# --- the bounds ------------------------------------------------------------------------------------------------------


def test_the_budget_grows_with_the_file_and_ends():
    budget = Budget(1 << 30)
    budget.take(8 << 30)
    with pytest.raises(CheckpointReadError, match="memory"):
        budget.take(65 << 20)
    with pytest.raises(CheckpointReadError, match="steps"):
        Budget(0).work(300_001)


def test_memory_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **kind: made.append(size) or empty(size, **kind))
    (tmp_path / "a.pt").write_bytes(torch_zip(weights(tensor(storage(1 << 40), size=(1 << 40,)))))
    with pytest.raises(CheckpointReadError, match="states"):
        load(tmp_path / "a.pt")
    assert not made


def test_a_repeated_builder_pays_for_what_it_copies(tmp_path):
    list_of = b"](" + b"K\x01" * 1000 + b"e\x85\x94"
    made = call("builtins.set", b"]")[:-4]  # the name alone
    (tmp_path / "a.pkl").write_bytes(pickled(list_of + made + b"\x94" + b"](" + b"h\x01h\x00R" * 2000 + b"e"))
    with pytest.raises(CheckpointReadError, match="steps"):
        load_official(tmp_path / "a.pkl")


def test_a_store_does_not_unpack_a_bomb(tmp_path):
    store = CheckpointStore(tmp_path)
    store.path(1).write_bytes(swollen(torch_zip(b"}", {}), "archive/data/0", b"", 1 << 30))
    assert not store.is_whole(store.path(1))


def test_messages_quote_names_fit_to_be_printed(tmp_path):
    name = ("\x1b[2J\n\ud800" + "a" * 5000).encode("utf-8", "surrogatepass")
    body = b"X" + len(name).to_bytes(4, "little") + name
    (tmp_path / "a.pt").write_bytes(torch_zip(body + body + b"\x93"))
    with pytest.raises(UnsafeCheckpointError) as caught:
        load(tmp_path / "a.pt")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000 and "\\x1b[2J" in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(saved({"w": torch.ones(1)}))

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied", "a.pt")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(CheckpointReadError, match=r"a\.pt' cannot be read: Permission denied"):
        load(tmp_path / "a.pt")
    monkeypatch.undo()
    with pytest.raises(CheckpointReadError, match="File name too long"):
        load(tmp_path / ("a" * 300))
    with pytest.raises(CheckpointReadError, match="no file"):
        load("a\0b")
