"""Shared work between two processes: they wait for each other, and fail together."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from core.errors import VitrineError
from core.processes import all_or_none


def _shares(rank: int, folder: str) -> None:
    wait = datetime.timedelta(seconds=40)
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
    dist.barrier()  # nothing of the failure is left behind
    dist.destroy_process_group()


def test_processes_wait_for_each_other_and_fail_together(tmp_path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_shares, (str(tmp_path),), nprocs=2)
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said[0] == "VitrineError: reading pictures ended because process 1 failed: OSError: disk full"
    assert said[1] == "OSError: disk full"


def test_one_process_alone_keeps_its_error() -> None:
    with all_or_none("nothing"):
        pass
    with pytest.raises(KeyError, match="lost"), all_or_none("reading"):
        raise KeyError("lost")
