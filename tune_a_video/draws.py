"""Random numbers of a batch that is spread over processes: those that one process with the whole batch would draw."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.dist import get_dist_info
from torch import Tensor


def own_rows(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's rows of what is drawn for the batches of all processes together.

    All processes have the same seed, so without this they would tune with the same noise and timesteps, and a second
    process would add nothing. Process r of W holds the samples r, r + W, ... of the joint batch (`core.data.sampling`).

    Args:
        draw: from a number of rows to a tensor with so many.
        rows: of this process; all have equally many.
    """
    rank, world = get_dist_info()
    return draw(rows * world)[rank::world]
