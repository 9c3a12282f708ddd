"""Shared by all tests: few threads, no network, runs in temporary folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from mmengine.utils import manager

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same random state, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _managers_unlocked() -> Iterator[None]:
    """A test in which mmengine fails to make a manager leaves its lock taken: tests that use threads would hang."""
    yield
    with contextlib.suppress(RuntimeError):
        while True:
            manager._lock.release()
