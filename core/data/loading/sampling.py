"""Samplers for single and distributed runs.

The global order of an epoch is a pure function of (seed, epoch). Rank r of W takes the global positions r, r + W,
r + 2W, ...; so batch k of all ranks together holds the samples of batch k of a single process whose batch is W times
as large, for every W. Each draw carries a seed that depends on (seed, epoch, global position) alone.
"""

from collections.abc import Iterator, Sized
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from core.data.loading.seeds import derive_seed

# Positions are never negative, so the order's own seed cannot coincide with a draw's.
_ORDER = -1


class Draw(int):
    """A dataset index that carries the seed its sample is made with.

    Equal to its int, and pickled with its seed, so that it reaches worker processes whole.
    """

    seed: int

    def __new__(cls, index: int, seed: int) -> "Draw":
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __reduce__(self) -> tuple:
        return Draw, (int(self), self.seed)

    def __repr__(self) -> str:
        return f"Draw({int(self)}, seed={self.seed})"


def rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The given rank and world size, or those of the running process group (0 and 1 without one)."""
    if (rank is None) != (world_size is None):
        raise ValueError("give both rank and world_size, or neither")
    if rank is None or world_size is None:
        from mmengine.dist import get_dist_info

        return get_dist_info()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    return rank, world_size


class TrainSampler(Sampler[Draw]):
    """This rank's draws of an epoch, or of an endless chain of epochs.

    Every rank gets equally many draws, as collective operations need: the end of an epoch is filled up from its
    beginning, or cut with ``drop_last``. (Cut together with incomplete batches, the number of steps is that of a
    single process with the same global batch.)

    Args:
        dataset: anything with a length.
        shuffle: a new permutation for every epoch; otherwise the dataset's order.
        seed: of the run, the same on every rank.
        repeats: repeated augmentation (Hoffer et al. 2020, as in DeiT): each chosen sample takes ``repeats``
            neighbouring positions, with different seeds, so that the ranks see different views of it.
        selected: how many draws an epoch has when ``repeats`` is above 1. ``"length"``: as many as the dataset has
            samples, so an epoch visits 1/repeats of them and costs what it costs without repeats (DeiT);
            ``"all"``: repeats times as many.
        infinite: chain the epochs without padding in between; for loops that count iterations.
        drop_last: cut the last draws of an epoch that do not divide among the ranks, in place of filling up.
        rank, world_size: in place of the process group's.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int = 0,
        repeats: int = 1,
        selected: Literal["length", "all"] = "length",
        infinite: bool = False,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError(f"{type(dataset).__name__} is empty: there is nothing to sample")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {repeats}")
        if selected not in ("length", "all"):
            raise ValueError(f"selected must be 'length' or 'all', not {selected!r}")
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.repeats = repeats
        self.selected = selected
        self.infinite = infinite
        self.drop_last = drop_last
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self.epoch = 0
        self._skip = 0

    @property
    def draws_per_epoch(self) -> int:
        """Draws of one epoch over all ranks, before they are made to divide."""
        return len(self.dataset) * (self.repeats if self.selected == "all" else 1)

    def __len__(self) -> int:
        """This rank's draws of one epoch; of an infinite sampler, its share of one epoch, rounded up."""
        if self.drop_last and not self.infinite:
            return self.draws_per_epoch // self.world_size
        return -(-self.draws_per_epoch // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass (of an infinite sampler: the first of the chain)."""
        self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Begin the next pass, and only that, after this rank's first ``num_samples`` draws."""
        if num_samples < 0 or (not self.infinite and num_samples > len(self)):
            raise ValueError(f"cannot skip {num_samples} of {len(self)} draws")
        self._skip = num_samples

    def order(self, epoch: int) -> np.ndarray:
        """Dataset indices by global position, int64 ``(draws_per_epoch,)``."""
        length = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, _ORDER))
            order = torch.randperm(length, generator=generator).numpy()
        else:
            order = np.arange(length)
        return np.repeat(order, self.repeats)[: self.draws_per_epoch] if self.repeats > 1 else order

    def __iter__(self) -> Iterator[Draw]:
        skip, self._skip = self._skip, 0
        if self.infinite:
            yield from self._chain(skip)
            return
        order = self.order(self.epoch)
        for position in range(self.rank + skip * self.world_size, len(self) * self.world_size, self.world_size):
            yield self._draw(order, self.epoch, position)

    def _chain(self, skip: int) -> Iterator[Draw]:
        # Ranks share one endless line of positions, so no epoch needs padding to divide.
        epochs, position = divmod(self.rank + skip * self.world_size, self.draws_per_epoch)
        epoch = self.epoch + epochs
        while True:
            order = self.order(epoch)
            while position < len(order):
                yield self._draw(order, epoch, position)
                position += self.world_size
            epochs, position = divmod(position, self.draws_per_epoch)
            epoch += epochs

    def _draw(self, order: np.ndarray, epoch: int, position: int) -> Draw:
        return Draw(int(order[position % len(order)]), derive_seed(self.seed, epoch, position))


class EvalSampler(Sampler[int]):
    """Every sample exactly once over all ranks, in the dataset's order; shares may differ by one.

    Nothing is padded, so metrics need not know about duplicates. Plain ints: an evaluation sample's seed is a
    function of its index alone (see :class:`core.data.SeededDataset`).
    """

    def __init__(self, dataset: Sized, rank: int | None = None, world_size: int | None = None) -> None:
        self.dataset = dataset
        self.rank, self.world_size = rank_and_world(rank, world_size)

    def _share(self) -> range:
        return range(self.rank, len(self.dataset), self.world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share())

    def __len__(self) -> int:
        return len(self._share())
