"""PyTorch's switches, and what else of the process a run sets: one run leaves nothing to the next."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # mmengine sets them where there are several processes


@contextlib.contextmanager
def switches(runtime: Mapping[str, Any]) -> Iterator[None]:
    """Sets number of threads and anomaly detection as a run's ``runtime`` says; afterwards all is as it was.

    Besides these, what mmengine sets when a runner is built is put back: deterministic algorithms, cuDNN's benchmark
    and determinism, OpenCV's threads, how child processes are started, and environment variables of threads.
    """
    import torch

    with contextlib.ExitStack() as stack:
        for put_back in _as_they_are(torch):
            stack.callback(put_back)
        if runtime.get("threads"):
            torch.set_num_threads(int(runtime["threads"]))
        if runtime.get("debug"):
            torch.autograd.set_detect_anomaly(True)
        yield


def _as_they_are(torch: Any) -> Iterator[Any]:
    """One function for each switch, which puts it where it is now."""
    import torch.multiprocessing as mp

    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    yield lambda: torch.set_num_threads(threads)
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    yield lambda: torch.autograd.set_detect_anomaly(*anomaly)
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield lambda: torch.use_deterministic_algorithms(mode, warn_only=warns)
    kept = {name: getattr(cudnn, name) for name in ("benchmark", "deterministic")}
    yield lambda: [setattr(cudnn, name, value) for name, value in kept.items()]
    start = mp.get_start_method(allow_none=True)
    yield lambda: mp.set_start_method(start, force=True)
    opencv = sys.modules["cv2"].getNumThreads() if "cv2" in sys.modules else -1  # -1: as when it is loaded
    yield lambda: "cv2" in sys.modules and sys.modules["cv2"].setNumThreads(opencv)
    variables = {name: os.environ.get(name) for name in _ENVIRONMENT}
    yield lambda: [_set(name, value) for name, value in variables.items()]


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
