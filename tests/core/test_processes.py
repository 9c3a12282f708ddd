"""Shared work between two processes: they wait for each other, and fail together."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from threading import Thread

import pytest
import torch.distributed as dist
from mmengine.utils import ManagerMixin, manager

from core.checkpoint.locks import Locked
from core.config.command.processes import all_or_none, first_decides, managers_unlocked
from core.errors import VitrineError
from tests import forked


def _shares(rank: int, folder: str) -> None:
    wait = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
    slow = Path(folder, "slow")
    with all_or_none("waiting"):
        if rank == 1:
            time.sleep(0.5)
            slow.write_text("done")
    assert slow.exists(), "the quick one has waited"
    said = ""
    try:
        with all_or_none("reading pictures"):
            if rank == 1:
                raise OSError("disk full")
    except (OSError, VitrineError) as error:
        said = f"{type(error).__name__}: {error}"
    Path(folder, str(rank)).write_text(said)
    Path(folder, f"decided{rank}").write_text(json.dumps(_decisions(rank)))
    dist.barrier()  # nothing of the failures is left behind
    dist.destroy_process_group()


def _decisions(rank: int) -> list:
    def choose(outcome: object) -> object:
        assert rank == 0, "the others are not asked"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    said = []
    for outcome in ({"folder": "a"}, Locked("taken"), ZeroDivisionError("by zero")):
        try:
            said.append(first_decides(lambda outcome=outcome: choose(outcome)))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have written what they did."""
    folder = tmp_path_factory.mktemp("processes")
    forked.pair(_shares, str(folder))
    return folder


@pytest.mark.processes
def test_processes_wait_for_each_other_and_fail_together(folder) -> None:
    said = [(folder / str(rank)).read_text() for rank in (0, 1)]
    assert said[1] == "OSError: disk full"
    assert said[0] == "VitrineError: reading pictures ended because process 1 failed: OSError: disk full"


@pytest.mark.processes
def test_the_first_process_decides_and_its_errors_reach_all(folder) -> None:
    first, second = (json.loads((folder / f"decided{rank}").read_text()) for rank in (0, 1))
    assert first == [{"folder": "a"}, "Locked: taken", "ZeroDivisionError: by zero"]
    assert second == [*first[:2], "VitrineError: the first process failed: ZeroDivisionError: by zero"]


def test_one_process_alone_keeps_its_error() -> None:
    with all_or_none("nothing"):
        pass
    with pytest.raises(KeyError, match="lost"), all_or_none("reading"):
        raise KeyError("lost")
    with pytest.raises(KeyError, match="lost"):
        first_decides(lambda: {}["lost"])


def test_where_mmengine_fails_other_threads_still_build():
    class Broken(ManagerMixin):
        def __init__(self, name):
            raise OSError("the log cannot be opened")

    def take():
        taken.append(manager._lock.acquire(timeout=300))
        manager._lock.release()

    taken = []
    with pytest.raises(OSError, match="cannot be opened"), managers_unlocked():
        Broken.get_instance("log")
    thread = Thread(target=take)
    thread.start()
    thread.join()
    assert taken == [True]
