"""Derived data: provenance that is checked, writing that resumes, reading that touches only what is asked for."""

import json
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import time

import numpy as np
import pytest
import torch

from core.config import files as files_module
from core.data import (
    CorruptCacheError,
    DerivedCache,
    IncompleteCacheError,
    StaleCacheError,
    build_loader,
    hash_file,
    hash_files,
    hash_state,
)
from core.data import cache as cache_module
from core.errors import VitrineError
from tests import forked

PROVENANCE = {"weights": "3fa2", "transform": {"size": 224, "crop": "center"}, "files": "77aa", "code": 1}
IDS = [f"clip_{i:03d}" for i in range(20)]


def record(identity):
    number = int(identity[-3:])
    return {"feature": torch.arange(6.0).view(2, 3) + number, "label": torch.tensor(number)}


def write(cache, ids):
    records = [record(identity) for identity in ids]
    cache.write(ids, {field: [item[field] for item in records] for field in records[0]})


def open_cache(folder, provenance=PROVENANCE, **options):
    return DerivedCache(folder, provenance, ids=IDS, **options)


def assert_holds(cache, ids):
    for identity in ids:
        found = cache[identity]
        assert found.keys() == {"feature", "label"}
        assert all(torch.equal(found[field], value) for field, value in record(identity).items())


@pytest.fixture
def full(tmp_path):
    with open_cache(tmp_path / "cache", shard_bytes=150) as cache:
        for start in range(0, 20, 4):
            write(cache, IDS[start : start + 4])
    return tmp_path / "cache"


# ---------------------------------------------------------------------------- reading and writing


def test_what_is_written_is_read(full):
    cache = open_cache(full)
    cache.require_complete()
    assert len(cache) == 20 and IDS[3] in cache and "other" not in cache
    assert len(list(full.glob("shard-*.json"))) > 2, "several shards"
    assert_holds(cache, reversed(IDS))
    value = cache[IDS[0]]["feature"]
    value += 1
    assert_holds(cache, IDS[:1])
    cache.verify()


def test_records_are_there_before_they_are_on_disk(tmp_path):
    cache = open_cache(tmp_path / "cache")
    write(cache, IDS[:3])
    assert not list((tmp_path / "cache").glob("*.npy")) and len(cache) == 3
    assert_holds(cache, IDS[:3])
    cache.flush()
    assert_holds(cache, IDS[:3])
    write(cache, IDS[3:5])
    assert_holds(cache, IDS[:5])
    assert cache.missing() == IDS[5:]
    cache.flush()
    assert_holds(open_cache(tmp_path / "cache"), IDS[:5])


def test_buffered_records_are_copies(tmp_path):
    cache = open_cache(tmp_path / "cache")
    features = torch.zeros(2, 3)
    cache.write(["a", "b"], {"feature": features})
    features += 1
    assert cache["a"]["feature"].tolist() == [0, 0, 0]
    assert cache["a"]["feature"].untyped_storage().nbytes() == 12


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 2),
        torch.randn(3, 2).bfloat16(),
        torch.randn(4).half(),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8),
        torch.zeros(0, 4),
        np.arange(3, dtype=np.int16),
    ],
)
def test_values_of_any_type_come_back_the_same(tmp_path, value):
    with DerivedCache(tmp_path / "cache", PROVENANCE) as cache:
        cache.write(["a", "b"], {"x": [value, value]})
    found = DerivedCache(tmp_path / "cache", PROVENANCE)["b"]["x"]
    expected = torch.as_tensor(value)
    assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


def test_lengths_may_differ(tmp_path):
    lengths = [3, 0, 5, 1]
    values = [torch.randn(length, 2) for length in lengths]
    with DerivedCache(tmp_path / "cache", PROVENANCE) as cache:
        cache.write(list("abcd"), {"x": values})
    cache = DerivedCache(tmp_path / "cache", PROVENANCE)
    for identity, value in zip("abcd", values, strict=True):
        assert torch.equal(cache[identity]["x"], value)


@pytest.mark.child
def test_records_are_read_by_worker_processes(full):
    class Cached(torch.utils.data.Dataset):
        def __init__(self, cache):
            self.cache = cache

        def __len__(self):
            return len(IDS)

        def __getitem__(self, index):
            return {**self.cache[IDS[index]], "sample_id": IDS[index]}

    cache = open_cache(full)
    cache[IDS[0]]
    loader = build_loader({"dataset": Cached(cache), "batch_size": 5, "num_workers": 2}, seed=0, training=False)
    assert [label for batch in loader for label in batch.data["label"].tolist()] == list(range(20))
    copy = pickle.loads(pickle.dumps(cache))
    assert_holds(copy, IDS)
    assert len(pickle.dumps(cache)) < 20_000


@pytest.mark.child
def test_reading_does_not_hold_the_data_in_memory(tmp_path):
    provenance = {"x": 1}
    with DerivedCache(tmp_path / "cache", provenance, shard_bytes=16 << 20) as cache:
        for i in range(12):
            cache.write([f"{i}"], {"x": torch.full((1, 4 << 20), i, dtype=torch.uint8)})
            assert cache._buffered_bytes < 16 << 20
    context = multiprocessing.get_context("fork")

    def child(queue):
        # 20 MB more than now: the whole cache would take 48 MB.
        used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_DATA, (used + (20 << 20), -1))
        cache = DerivedCache(tmp_path / "cache", provenance)
        queue.put([int(cache[f"{i}"]["x"][i]) for i in range(12)])

    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join(300)
    assert process.exitcode == 0 and queue.get() == list(range(12))


# ---------------------------------------------------------------------------- provenance


def test_a_stale_cache_is_refused_and_says_what_differs(full):
    now = {"weights": "9bc1", "transform": {"size": 256, "crop": "center"}, "files": "77aa", "normalise": True}
    with pytest.raises(StaleCacheError) as caught:
        open_cache(full, now)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{full} was derived from something else:"
    assert lines[1:-1] == [
        "  code: stored 1, now absent",
        "  normalise: stored nothing, now True",
        "  transform.size: stored 224, now 256",
        "  weights: stored '3fa2', now '9bc1'",
    ]
    assert "Delete the folder" in lines[-1] and "refresh=True" in lines[-1]
    assert_holds(open_cache(full), IDS)


def test_refresh_replaces_a_stale_cache_and_keeps_a_fresh_one(full):
    (full / "notes.txt").write_text("mine")
    assert len(open_cache(full, refresh=True)) == 20
    other = {**PROVENANCE, "weights": "new"}
    cache = open_cache(full, other, refresh=True)
    assert len(cache) == 0 and cache.missing() == IDS and not list(full.glob("*.npy"))
    assert (full / "notes.txt").read_text() == "mine"
    assert len(open_cache(full, other)) == 0
    with pytest.raises(StaleCacheError):
        open_cache(full)


def test_provenance_is_compared_as_it_is_stored(tmp_path):
    DerivedCache(tmp_path / "cache", {"sizes": (1, 2), "scale": 0.1})
    DerivedCache(tmp_path / "cache", {"scale": 0.1, "sizes": [1, 2]})
    with pytest.raises(TypeError, match="provenance holds a Tensor; give its repr, or a hash"):
        DerivedCache(tmp_path / "cache", {"weights": torch.zeros(1)})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(CorruptCacheError, match=r"holds files but no provenance.json"):
        open_cache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_weights_are_known_by_their_values():
    state = {"b": torch.zeros(2), "a": torch.ones(3, dtype=torch.bfloat16), "n": 3}
    same = {"n": 3, "a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(2)}
    assert hash_state(state) == hash_state(same)
    changed = [
        {**state, "b": torch.tensor([0.0, 1e-30])},
        {**state, "b": torch.zeros(1, 2)},
        {**state, "b": torch.zeros(2, dtype=torch.float64)},
        {**state, "n": 4},
        {"c": state["b"], "a": state["a"], "n": 3},
    ]
    assert len({hash_state(item) for item in [state, *changed]}) == 6
    view = torch.arange(6.0).view(2, 3).T
    assert hash_state({"x": view}) == hash_state({"x": view.contiguous()})


def test_files_are_known_by_name_and_time_or_by_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    stat, content = hash_files(["a", "b"], tmp_path), hash_files(["a", "b"], tmp_path, content=True)
    assert hash_files([tmp_path / "a", tmp_path / "b"], tmp_path) == stat
    assert hash_files(["b", "a"], tmp_path) != stat
    os.utime(tmp_path / "b", ns=(1, 1))
    assert hash_files(["a", "b"], tmp_path) != stat
    assert hash_files(["a", "b"], tmp_path, content=True) == content
    (tmp_path / "b").write_text("c")
    assert hash_files(["a", "b"], tmp_path, content=True) != content
    assert hash_file(tmp_path / "a") != hash_file(tmp_path / "b")


# ---------------------------------------------------------------------------- incomplete, interrupted, damaged


def test_an_incomplete_cache_says_how_much_is_missing(tmp_path):
    with open_cache(tmp_path / "cache") as cache:
        write(cache, IDS[2:10])
    cache = open_cache(tmp_path / "cache")
    assert cache.missing() == IDS[:2] + IDS[10:] and cache.missing(IDS[1:4]) == IDS[1:2]
    with pytest.raises(IncompleteCacheError, match=r"lacks 12 of 20 records, first 'clip_000'"):
        cache.require_complete()
    with pytest.raises(IncompleteCacheError, match=r"no record of 'clip_000' .it has 8 others"):
        cache[IDS[0]]
    with pytest.raises(ValueError, match="pass ids"):
        DerivedCache(tmp_path / "cache", PROVENANCE).missing()


@pytest.mark.child
def test_a_killed_writer_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "cache"

    def killed():
        cache = open_cache(folder, shard_bytes=100)
        for identity in IDS[:15]:
            write(cache, [identity])
        # In the middle of a shard: its array is there, its record is not.
        cache._write_field("shard-r0000-000099.feature.npy", "feature", [record(IDS[0])])
        (folder / ".shard-r0000-000099.label.npy.x.tmp").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    cache = open_cache(folder, shard_bytes=100)
    left = cache.missing()
    assert IDS[15:] == left[-5:] and 5 <= len(left) < 10, "only what was not yet a shard is lost"
    with cache:
        for identity in left:
            write(cache, [identity])
    assert_holds(open_cache(folder), IDS)
    assert not list(folder.glob("*000099*")) and not list(folder.glob(".*.tmp"))


def test_an_error_while_computing_keeps_what_was_computed(tmp_path):
    with pytest.raises(RuntimeError, match="encoder"), open_cache(tmp_path / "cache") as cache:
        write(cache, IDS[:3])
        raise RuntimeError("encoder")
    assert open_cache(tmp_path / "cache").missing() == IDS[3:]


def test_a_full_disk_leaves_the_cache_whole(full, monkeypatch):
    for path in full.glob("shard-*-000001.*"):
        path.unlink()
    cache = open_cache(full)
    lost = cache.missing()
    assert lost

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", no_space)
        write(cache, lost)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert not list(full.glob(".*.tmp"))
    assert open_cache(full).missing() == lost
    cache.flush()
    assert_holds(open_cache(full), IDS)


@pytest.mark.child
def test_several_ranks_fill_one_cache(tmp_path):
    folder = tmp_path / "cache"

    def fill(rank):
        with open_cache(folder, shard_bytes=60, rank=rank, world_size=3) as cache:
            for identity in cache.missing(mine=True):
                write(cache, [identity])

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(rank,)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = open_cache(folder)
    cache.require_complete()
    assert len(cache) == 20
    assert_holds(cache, IDS)


def test_shares_do_not_depend_on_who_was_faster(tmp_path):
    first = open_cache(tmp_path / "cache", rank=0, world_size=2)
    assert first.missing(mine=True) == IDS[0::2]
    write(first, IDS[0:8:2])
    first.flush()
    second = open_cache(tmp_path / "cache", rank=1, world_size=2)
    assert second.missing(mine=True) == IDS[1::2]
    assert first.missing(mine=True) == IDS[8::2]
    write(second, [IDS[1]])
    second.flush()
    assert IDS[1] not in first
    first.reload()
    assert_holds(first, [IDS[0], IDS[1]])


def test_two_writers_of_one_rank_in_a_process_are_refused(tmp_path):
    first, second = open_cache(tmp_path / "cache"), open_cache(tmp_path / "cache")
    write(first, IDS[:1])
    with pytest.raises(VitrineError, match=r"this process writes to .* as rank 0 already"):
        write(second, IDS[1:2])
    first.flush()
    del first
    write(second, IDS[1:2])


FILL = """
import sys, time
from pathlib import Path
import torch
from core.data import DerivedCache

folder, go, ids = Path(sys.argv[1]), Path(sys.argv[2]), [f"clip_{i:03d}" for i in range(20)]
with DerivedCache(folder, eval(sys.argv[3]), ids=ids, shard_bytes=1) as cache:
    for number, name in enumerate(cache.missing()):
        if number == 5:
            print("begun", flush=True)
            while not go.exists():
                time.sleep(0.01)
        feature = torch.arange(6.0).view(1, 2, 3) + int(name[-3:])
        cache.write([name], {"feature": feature, "label": [int(name[-3:])]})
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has written five records, and goes on when the file `go` is there."""
    words = ["-c", FILL, str(tmp_path / "cache"), str(tmp_path / "go"), repr(PROVENANCE)]
    process = forked.begin(words, tmp_path, dict(os.environ))
    while process.poll() is None and process.said() != "begun\n":
        time.sleep(0.01)
    assert process.said() == "begun\n"
    yield process
    process.send_signal(signal.SIGKILL)


@pytest.mark.child
def test_a_second_process_waits_for_the_first_and_shares_what_it_made(tmp_path, other, monkeypatch):
    said = []

    def say(line):
        said.append(line)
        (tmp_path / "go").touch()

    monkeypatch.setattr(cache_module, "_say", say)
    with open_cache(tmp_path / "cache") as cache:
        assert cache.missing() == []
    assert (
        said[0].startswith(f"waiting for process {other.pid} on {socket.gethostname()}") and "being filled" in said[0]
    )
    assert_holds(cache, IDS)


@pytest.mark.child
def test_records_of_another_process_are_not_written_twice(tmp_path, other, monkeypatch):
    monkeypatch.setattr(cache_module, "_say", lambda line: (tmp_path / "go").touch())
    cache = open_cache(tmp_path / "cache")
    write(cache, cache.missing())  # what that one makes meanwhile
    cache.flush()
    assert other.done().returncode == 0
    assert len(open_cache(tmp_path / "cache")) == 20


@pytest.mark.child
def test_a_process_that_was_killed_is_not_waited_for(tmp_path, other, monkeypatch):
    other.send_signal(signal.SIGKILL)
    assert other.done().returncode == -signal.SIGKILL
    monkeypatch.setattr(cache_module, "_say", lambda line: pytest.fail(line))
    with open_cache(tmp_path / "cache") as cache:
        assert cache.missing() == IDS[5:]
        write(cache, IDS[5:])
    assert_holds(open_cache(tmp_path / "cache"), IDS)


def test_a_whole_cache_is_read_while_somebody_writes_another_one(full):
    with open_cache(full) as cache:  # nothing is missing: nothing is locked
        assert not list(full.glob(".writer*"))
    assert_holds(cache, IDS)


def test_damage_is_noticed(full):
    path = sorted(full.glob("shard-*.feature.npy"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(CorruptCacheError, match=f"{path} is not what was written"):
        open_cache(full).verify()
    path.write_bytes(whole[:-4])
    with pytest.raises(CorruptCacheError, match=rf"{path} has {len(whole) - 4} bytes in place of {len(whole)}"):
        open_cache(full)
    path.unlink()
    shard = path.name.split(".")[0]
    with pytest.raises(CorruptCacheError, match=rf"{path} is missing; delete {shard}.json to redo it"):
        open_cache(full)
    gone = json.loads((full / f"{shard}.json").read_text())["ids"]
    (full / f"{shard}.json").unlink()
    cache = open_cache(full)
    assert cache.missing() == gone
    with cache:
        write(cache, gone)
    assert_holds(open_cache(full), IDS)


def test_mistakes_in_writing_are_named_and_change_nothing(tmp_path):
    cache = open_cache(tmp_path / "cache")
    write(cache, IDS[:2])
    good = {"feature": torch.zeros(1, 2, 3), "label": torch.zeros(1, dtype=torch.int64)}
    for ids, values, message in [
        ([IDS[0]], good, "has a record of 'clip_000' already"),
        (["x", "x"], {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in good.items()}, "an id occurs twice"),
        (["x", "y"], good, "2 ids, but 1 values of 'feature'"),
        (["x"], {"feature": good["feature"]}, r"the record of 'x' holds .* where others hold"),
        (["x"], {**good, "feature": torch.zeros(1, 2, 4)}, r"\['float32', '\*', 4\].* where others hold"),
        (["x"], {**good, "feature": torch.zeros(1, 2, 3).half()}, "float16"),
        (["x"], {**good, "a/b": good["label"]}, "letters, digits, _ and -, not 'a/b'"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.write(ids, values)
        assert len(cache) == 2
    cache.flush()
    with pytest.raises(ValueError, match="where others hold"):
        open_cache(tmp_path / "cache").write(["x"], {**good, "feature": torch.zeros(1, 5)})
