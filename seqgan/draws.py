"""Random numbers for the rows of a batch that several processes share."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.dist import get_dist_info
from torch import Tensor


def joint_rows(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """What `draw` gives for this process's rows of the joint batch.

    Processes begin with one seed. If each drew for its own rows, all of them would hide the same places; so each draws
    for everybody and keeps its own: rows r, r + W, ... of process r of W, which is how samples are dealt
    (`core.data.sampling`). One process with the joint batch draws the same.

    Args:
        draw: number of rows to a tensor `(rows, ...)`.
        rows: of this process, as many as every other has.
    """
    rank, processes = get_dist_info()
    return draw(processes * rows)[rank::processes]
