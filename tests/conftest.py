"""Shared by all tests: few threads, no network, runs in temporary folders, marks that say what a test costs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator
from typing import Any

# One thread for each worker of pytest-xdist and for every process that a test starts: two workers fill two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else a pool of processes, one a core
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from mmengine.utils import manager

from tests import costs

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in costs.MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    config.addinivalue_line("markers", "xdist_group(name): tests that one worker of pytest-xdist runs")
    costs.watch()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    costs.arrange(items, several=hasattr(config, "workerinput"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from costs.held(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from costs.held(item))


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled kernels are kept for each worker alone, and for this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


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
