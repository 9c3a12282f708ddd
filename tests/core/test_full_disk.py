"""A disk that fills while a run trains: one line that says what, where, what is saved and what to do."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from mmengine.hooks import Hook

from core.checkpoint.run_folder import find_checkpoint
from core.errors import VitrineError
from tests.killing import losses


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full:
    """A file on a disk that is full."""

    write, flush, close = full, full, full


class Fills(Hook):
    """From step 12 on, one of the run's logs meets a full disk."""

    def __init__(self, where: str) -> None:
        self.where = where

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter != 12:
            return
        if self.where == "run.log":
            (handler,) = (h for h in runner.logger.handlers if isinstance(h, logging.FileHandler))
            handler.stream.close()
            handler.stream = Full()
            return
        for backend in runner.visualizer._vis_backends.values():
            if self.where == "events" and hasattr(backend, "_tensorboard"):
                backend._tensorboard.flush = full
            elif getattr(backend, "path", Path()).name == self.where:
                backend.close()
                backend._file = Full()


@pytest.mark.parametrize("where", ["log.jsonl", "log.csv", "run.log", "events"])
def test_a_disk_that_fills_ends_the_run_in_one_line(tiny, where, capsys):
    words = (
        "visualizer.vis_backends=[{type: core.JsonLines}, {type: core.CSV}, {type: core.TensorBoard}]",
        "run_dir=filled",
        "media=null",
    )
    hook = f"+custom_hooks.fills={{type: test_full_disk.Fills, where: {where}}}"
    with pytest.raises(VitrineError) as caught:
        tiny(*words, hook)
    said = str(caught.value)
    place = "filled" if where == "events" else where
    assert "\n" not in said and f"{place}: No space left on device. Free some space" in said
    assert "saved filled/checkpoints/step_00000010.pt, the state of step 10" in said and "resume=auto" in said
    assert find_checkpoint(Path("filled")).name == "step_00000010.pt"
    assert "Traceback" not in capsys.readouterr().err
    result = tiny(*words, "resume=filled", "resume_changes=[custom_hooks]")
    assert result["steps"] == 30 and max(losses(Path("filled"))) == 30


class Fails(Hook):
    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 12:
            raise ValueError("a bug")


def test_a_run_that_fails_leaves_no_file_open(tiny):
    before = open_files()
    with pytest.raises(ValueError, match="a bug"):
        tiny("run_dir=fails", "+custom_hooks.fails={type: test_full_disk.Fails}")
    assert not [name for name in open_files() - before if "log.jsonl" in name or "tfevents" in name]


def open_files() -> set[str]:
    return {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
