"""A run's checkpoint folder: the newest whole one is found, the right ones stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from core.checkpoint import CheckpointStore, Damaged, load


def _fill(folder, steps, **options) -> CheckpointStore:
    store = CheckpointStore(folder, **options)
    for step in steps:
        store.save({"w": torch.full((100,), float(step))}, step)
    return store


def _flip(path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def test_names_index_and_newest(tmp_path):
    store = _fill(tmp_path / "c", [5, 10, 1234], keep_last=None)
    assert store.newest().name == "step_00001234.pt"
    assert load(store.newest())["w"][0] == 1234
    assert store.steps() == [5, 10, 1234]
    assert CheckpointStore(tmp_path / "none").newest() is None
    assert CheckpointStore(tmp_path / "none").prune() == []


@pytest.mark.parametrize("cut", [0, 1, 500, -1])
def test_a_truncated_file_is_never_taken_as_whole(tmp_path, cut):
    store = _fill(tmp_path, [1, 2])
    content = store.path(2).read_bytes()
    store.path(2).write_bytes(content[:cut])
    with pytest.warns(Damaged, match="step_00000002"):
        assert store.newest() == store.path(1)


@pytest.mark.parametrize("indexed", [True, False])
def test_altered_bytes_are_noticed_with_and_without_the_index(tmp_path, indexed):
    store = _fill(tmp_path, [1, 2])
    if not indexed:
        (tmp_path / "index.json").unlink()
    assert store.newest() == store.path(2)
    position = store.path(2).read_bytes().index(torch.full((100,), 2.0).numpy().tobytes())
    _flip(store.path(2), position + 200)
    with pytest.warns(Damaged):
        assert store.newest() == store.path(1)


def test_a_file_written_anew_before_a_crash_hid_it_from_the_index_is_whole(tmp_path):
    store = _fill(tmp_path, [1, 2])
    index = (tmp_path / "index.json").read_text()
    store.save({"w": torch.zeros(200)}, 2)
    (tmp_path / "index.json").write_text(index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.newest() == store.path(2)


def test_a_damaged_index_costs_no_checkpoint(tmp_path):
    store = _fill(tmp_path, [1, 2])
    (tmp_path / "index.json").write_text('{"checkpoints": ')
    with pytest.warns(Damaged, match=r"index\.json"):
        assert store.newest() == store.path(2)


def test_all_damaged_means_none(tmp_path):
    store = _fill(tmp_path, [1])
    store.path(1).write_bytes(b"")
    with pytest.warns(Damaged):
        assert store.newest() is None


def test_keep_last(tmp_path):
    assert _fill(tmp_path / "a", range(1, 7), keep_last=2).steps() == [5, 6]
    assert _fill(tmp_path / "b", range(1, 7), keep_last=None).steps() == [1, 2, 3, 4, 5, 6]
    names = {"index.json", "step_00000005.pt", "step_00000006.pt"}
    assert set(os.listdir(tmp_path / "a")) == names
    assert set(json.loads((tmp_path / "a" / "index.json").read_text())["checkpoints"]) == names - {"index.json"}


@pytest.mark.parametrize(("direction", "best"), [("higher", 2), ("lower", 4)])
def test_keep_best_and_best(tmp_path, direction, best):
    values = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.1, 5: 0.4, 6: 0.3, 7: float("nan")}
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1, metric="top1", direction=direction)
    for step, value in values.items():
        store.save({"step": step}, step, {"top1": value, "other": 1})
    assert store.best() == store.path(best)
    assert store.steps() == [best, 7]
    assert store.metrics(best) == {"top1": values[best], "other": 1.0}


def test_two_best_stay_and_the_newer_of_equals_wins(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=2, metric="a")
    for step, value in enumerate([3, 5, 5, 1, 1]):
        store.save({"step": step}, step, {"a": value})
    assert store.best() == store.path(2)
    assert store.steps() == [1, 2, 4]


def test_metrics_that_come_later(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1, metric="a")
    for step in range(1, 4):
        store.save({"step": step}, step)
        store.annotate(step, {"a": -step})
    assert store.best() == store.path(1)
    assert store.steps() == [1, 3]
    with pytest.raises(KeyError, match="step 9"):
        store.annotate(9, {"a": 1})


@pytest.mark.parametrize(("keep_last", "stay"), [(None, [1, 2, 3, 4, 5, 7]), (2, [2, 4, 5, 7])])
def test_an_interim_checkpoint_stays_until_the_next_one_unless_it_is_the_best(tmp_path, keep_last, stay):
    store = CheckpointStore(tmp_path, keep_last=keep_last, keep_best=1, metric="a")
    for step in range(1, 8):
        store.save({"step": step}, step, interim=step in (2, 6, 7))
        assert store.newest() == store.path(step)
        store.annotate(step, {"a": 9 if step == 2 else 1})
    assert store.steps() == stay
    store.keep(7)
    store.save({"step": 8}, 8)
    assert 7 in store.steps()


def test_a_damaged_best_gives_way_to_the_next(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=None, metric="a")
    for step, value in [(1, 1), (2, 3), (3, 2)]:
        store.save({"step": step}, step, {"a": value})
    store.path(2).write_bytes(store.path(2).read_bytes()[:-5])
    with pytest.warns(Damaged):
        assert store.best() == store.path(3)


def test_pruning_never_removes_the_only_whole_checkpoint(tmp_path):
    store = _fill(tmp_path, [1, 2, 3], keep_last=3)
    _flip(store.path(3), store.path(3).read_bytes().index(torch.full((100,), 3.0).numpy().tobytes()))
    store.path(2).write_bytes(b"cut")
    store.keep_last = 1
    removed = store.prune()
    assert store.path(1) not in removed
    with pytest.warns(Damaged):
        assert store.newest() == store.path(1)


def test_damaged_files_do_not_count_as_kept(tmp_path):
    store = _fill(tmp_path, [1, 2, 3], keep_last=2)
    store.path(3).write_bytes(b"cut")
    store.save({"w": 4}, 4)
    assert store.is_whole(store.path(2)) and store.is_whole(store.path(4))


def test_a_new_start_in_the_same_folder_keeps_what_it_writes(tmp_path):
    _fill(tmp_path, [100, 200], keep_last=2)
    store = _fill(tmp_path, [10], keep_last=2)
    assert store.path(10).exists()


@pytest.mark.child
def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    code = textwrap.dedent(
        """
        import os, sys, torch
        from core.checkpoint import CheckpointStore
        store = CheckpointStore(sys.argv[1])
        store.save({"w": torch.zeros(10)}, 1)
        real = torch.save
        def killed(state, file):
            real(state, file)
            os.kill(os.getpid(), 9)
        torch.save = killed
        store.save({"w": torch.zeros(10)}, 2)
        """
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=600)
    assert ran.returncode == -9
    assert [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]
    store = CheckpointStore(tmp_path)
    assert store.newest() == store.path(1)
    store.save({"w": 3}, 3)
    assert set(os.listdir(tmp_path)) == {"index.json", "step_00000001.pt", "step_00000003.pt"}


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_best": -1}, {"direction": "up"}])
def test_senseless_options_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CheckpointStore(tmp_path, **options)
