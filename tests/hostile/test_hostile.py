"""Hostile and broken weight files: refused in one line, whatever reads them, and nothing in them is executed."""

from __future__ import annotations

import gc
import os
import zipfile

import numpy as np
import pytest
import torch

from core.checkpoint import (
    CheckpointReadError,
    CheckpointStore,
    Damaged,
    StateMismatch,
    UnsafeCheckpointError,
    builders,
    load,
    load_official,
    load_state,
    reading,
    save_atomic,
)
from core.checkpoint.official.limits import Budget
from core.errors import ConfigError
from tests import forked
from tests.hostile.builders import (
    MEGABYTE,
    call,
    legacy,
    legacy_tensor,
    pickled,
    saved,
    storage,
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


@pytest.mark.child
def test_the_command_counts_refusals():
    words = ["--no-record", "a pipe", "a shell command in a torch file"]
    ran = forked.run(["-m", "tests.hostile", *words], ROOT, dict(os.environ))
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
    budget.take(2 << 30)
    with pytest.raises(CheckpointReadError, match="memory"):
        budget.take(129 << 20)
    with pytest.raises(CheckpointReadError, match="steps"):
        Budget(0).work(300_001)


def _usual_files():
    """Files as people write them, each with a tensor `layers.0.weight` that begins with 0, 1."""
    names = [f"layers.{i}.weight" for i in range(8)]
    weights = {name: torch.arange(20_000.0) + i for i, name in enumerate(names)}
    views = {f"{name}.{half}": weights[name].view(2, -1)[half] for name in names for half in (0, 1)}
    arrays = {name: np.arange(20_000) for name in names}
    both = {"model": {"w": torch.ones(20_000)}, **weights}
    return {
        "a shard": saved({name: weights[name] for name in names[:4]}),
        "one tensor under all names": saved(dict.fromkeys(names, weights[names[0]])),
        "views beside what they show": saved({**weights, **views}),
        "EMA beside weights": saved(both),
        "EMA beside weights, older format": saved(both, "legacy"),
        "arrays as texts": saved(arrays, 2),
        "arrays in a torch file": saved({"model": arrays, **weights}),
        "arrays as bytes": saved(arrays, 4),
        "tensors in a plain pickle": saved(weights, 2),
    }


@pytest.mark.parametrize("kind", _usual_files())
def test_usual_files_need_none_of_the_spare_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("core.checkpoint.official.limits.SPARE", 0)
    (tmp_path / "a.pt").write_bytes(_usual_files()[kind])
    assert load_official(tmp_path / "a.pt")["layers.0.weight"][:2].tolist() == [0, 1]


@pytest.mark.parametrize(
    "content",
    [
        saved(["\U0001f600" + "a" * MEGABYTE], 4),  # four bytes a letter
        legacy(weights(*[legacy_tensor(1 << 20, str(i)) for i in range(3)])),
        torch_zip(weights(tensor()), {"0": bytes(MEGABYTE)}, zipfile.ZIP_DEFLATED),
        torch_zip(weights(tensor(storage(1 << 18), (1 << 18, 4), (1, 0))), {"0": bytes(MEGABYTE)}),
    ],
    ids=["a wide letter", "storages that are not there", "zeros", "a tensor of four times its storage"],
)
def test_what_takes_more_than_the_file_states_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr("core.checkpoint.official.limits.SPARE", 0)
    monkeypatch.setattr("core.checkpoint.official.archive.SPARE", 0)
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointReadError, match="more memory than its"):
        load_official(tmp_path / "a.pt")


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


def test_slow_builders_pay_for_their_time(tmp_path, monkeypatch):
    made = {"tensors": 0, "files": 0}

    def counted(name, function):
        def call(*arguments):
            made[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(builders.Storage, "tensor", counted("tensors", builders.Storage.tensor))
    monkeypatch.setattr(reading, "_read_zip", counted("files", reading._read_zip))
    for name in ("half a million tensors of one storage", "half a million files in a pickle"):
        FILES[name].write(tmp_path / "a.pt", tmp_path / "mark")
        with pytest.raises(CheckpointReadError, match="steps"):
            load_official(tmp_path / "a.pt")
    assert 10_000 < made["tensors"] < 80_000 and 500 < made["files"] < 2_000


def test_a_store_does_not_unpack_a_bomb(tmp_path):
    store = CheckpointStore(tmp_path)
    # Its checksums are right: only what it would unpack to speaks against it.
    FILES["a torch file that unpacks to 20 times its size"].write(store.path(1), tmp_path / "mark")
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


# --- what users do with weights --------------------------------------------------------------------------------------


def test_a_conversion_copies_what_many_names_share_once(tmp_path, monkeypatch):
    from core.engine.commands.convert import ConversionError, Options, convert_file

    shared = torch.arange(1 << 20, dtype=torch.float32)
    (tmp_path / "a.pt").write_bytes(saved({f"layers.{i}.weight": shared for i in range(40)}))
    monkeypatch.setattr(
        "core.engine.commands.convert.find_converter", lambda paper, reverse: (lambda state: dict(state), {})
    )
    convert_file(Options("stvit", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")))
    loaded = load(tmp_path / "b.pt")
    assert torch.equal(loaded["layers.39.weight"], shared) and (tmp_path / "b.pt").stat().st_size < 5 << 20
    with pytest.raises(ConversionError, match=r"40 names share 1 tensors of 4\.2 MB"):
        convert_file(Options("stvit", str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")))


@pytest.mark.parametrize(
    "content",
    [
        {"hooks": {}, "position": 2, "model": 3},
        {"hooks": 1, "position": 2, "model": {}},
        {"hooks": {"EMAHook": 3}, "position": 2, "model": {}},
        {"hooks": {"EMAHook": {}}, "position": 2, "model": {}},
    ],
)
def test_a_run_of_wrong_parts_holds_no_weights(tmp_path, content):
    from core.checkpoint.weights import load_weights

    (tmp_path / "a.pt").write_bytes(saved(content))
    with pytest.raises(ConfigError, match=r"a\.pt' is not a whole checkpoint of a run"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "a.pt")


def test_states_that_are_no_weights_are_refused_before_anything_changes():
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    for state, reason in (
        ({1: torch.ones(2)}, "its key '1' \\(int\\) is not a name"),
        ({"weight": torch.ones(2, 2, device="meta"), "bias": torch.ones(2)}, "meta"),
        ({"weight": torch.ones(2, 2).to_sparse(), "bias": torch.ones(2)}, "sparse"),
        ({"weight\x1b[2J" + "a" * 5000: torch.ones(2)}, r"weight\\x1b\[2Ja+ \.\.\. a+ "),
    ):
        with pytest.raises(StateMismatch, match=reason) as caught:
            load_state(model, state)
        assert all(line.isprintable() for line in str(caught.value).splitlines())
        assert torch.equal(model.weight, before)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    for value in (torch.ones(2, device="meta"), torch.ones(2).to_sparse()):
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a (meta|sparse coo) tensor"):
            save_atomic({"a": [1, value]}, tmp_path / "a.pt")
    marked = {"conj": torch.tensor([1 + 2j]).conj(), "neg": torch.tensor([1 + 2j]).conj().imag}
    small = {str(kind): torch.ones(3).to(kind) for kind in (torch.float8_e4m3fn, torch.uint16, torch.complex64)}
    save_atomic({**marked, **small}, tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt")
    assert all(
        torch.equal(loaded[k].to(torch.complex64), v.to(torch.complex64)) for k, v in {**marked, **small}.items()
    )


@pytest.mark.parametrize(
    "state", [{}, {"model": {}, "position": {}, "hooks": {}, "random": [], "step": 1}, {"model": 3}]
)
def test_a_run_does_not_go_on_from_a_checkpoint_of_wrong_parts(tmp_path, state):
    from core.engine.runner import FORMAT, Runner

    (tmp_path / "a.pt").write_bytes(saved({"format": FORMAT, **state}))
    with pytest.raises(ConfigError, match=r"a\.pt is damaged: .*random.* is not in it"):
        Runner._restore(None, tmp_path / "a.pt")


@pytest.mark.parametrize(
    "text", ["[]", '{"checkpoints": []}', '{"checkpoints": {"step_00000001.pt": 3}}', "[" * 100_000, "\ufeff{}"]
)
def test_a_store_goes_on_without_a_broken_index(tmp_path, text):
    store = CheckpointStore(tmp_path)
    store.save({"w": torch.ones(1)}, 1)
    (tmp_path / "index.json").write_text(text)
    with pytest.warns(Damaged, match="judged without it"):
        assert store.newest() == store.path(1)
