"""Random states as plain tensors and numbers, which exact resume has to carry, and draws that processes share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from torch import Tensor


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators (every CUDA device included)."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts every generator where `random_state` found it."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Runs its body from `seed` and leaves the generators as they were: evaluation repeats and disturbs nothing."""
    state = random_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(state)


def own_rows(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's rows of what is drawn for the batches of all processes together.

    All processes have the same seed: if each drew for its own rows alone, all would have the same noise or masks, and a
    second process would add little. Process r of W holds the samples r, r + W, ... of the joint batch
    (`core.data.loading.sampling`), so that together they draw what one process with all of it would.

    Args:
        draw: from a number of rows to a tensor `(rows, ...)`.
        rows: of this process; all have equally many.
    """
    rank, processes = get_dist_info()
    return draw(rows * processes)[rank::processes]
