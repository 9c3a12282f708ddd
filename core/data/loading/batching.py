"""Batches of draws, resuming in the middle of an epoch, and passes that end early."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch.utils.data import BatchSampler, Sampler

from core.data.loading.sampling import Draw, rank_and_world
from core.data.loading.seeds import derive_seed


class ResumableBatchSampler(Sampler[list[int]]):
    """Any batch sampler, able to begin a pass at batch ``start``, and giving every training index a seed.

    ``start`` batches are passed over without loading any data, once: it is 0 again when the pass has begun. Where
    the sampler can jump (``skip``, as TrainSampler and mmengine's InfiniteSampler can), it jumps.

    Indices of samplers that know nothing of :class:`Draw` (mmengine's and mmdet's, torch's own) become draws here:
    the n-th index of rank r of W counts as global position n * W + r.

    Args:
        batch_sampler: yields lists of indices.
        seed: of the run.
        training: evaluation indices stay plain.
        rank, world_size: in place of the process group's.
        limit: a pass ends after the smallest of these: a number of batches, or a share in (0, 1] of those that there
            are, at least one. What a sampler that never ends gives is cut into epochs of that many.
        repeat: every epoch has the batches of the first, with the same seeds.

    Attributes:
        whole: batches of a pass without a limit; None for a sampler that never ends.
        drawn: indices that the last pass has given.

    Raises:
        TypeError: a share of a sampler that never ends.
    """

    def __init__(
        self,
        batch_sampler: Iterable[list[int]],
        seed: int = 0,
        training: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        limit: Sequence[int | float] = (),
        repeat: bool = False,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.training = training
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self.epoch = 0
        self.start = 0
        self.drawn = 0
        self.repeat = repeat
        self.limit = min(map(self._batches, limit), default=None)
        self._first: list[list[int]] | None = None  # the batches that are repeated
        self._pass = 0
        sampler = self.sampler
        # torch's random samplers take their seed from the global generator, which a resumed run has elsewhere.
        self._generator = torch.Generator() if getattr(sampler, "generator", self) is None else None
        if self._generator is not None:
            sampler.generator = self._generator

    @property
    def sampler(self) -> Iterable[int] | None:
        """The sampler below the batches, if there is one."""
        return getattr(self.batch_sampler, "sampler", None)

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch, where the batch sampler has one size."""
        return getattr(self.batch_sampler, "batch_size", None)

    @property
    def _endless(self) -> bool:
        from mmengine.dataset import InfiniteSampler

        sampler = self.sampler
        return isinstance(sampler, InfiniteSampler) or getattr(sampler, "infinite", False)

    @property
    def infinite(self) -> bool:
        """Whether a pass is known never to end."""
        return self._endless and self.limit is None

    @property
    def whole(self) -> int | None:
        """Batches of a pass without a limit; None for a sampler that never ends."""
        return None if self._endless else len(self.batch_sampler)

    def _batches(self, limit: int | float) -> int:
        """Batches that a limit leaves."""
        share = isinstance(limit, float) and limit <= 1
        return max(1, round(limit * self._all())) if share else int(limit)

    def _all(self) -> int:
        if self._endless:
            raise TypeError(f"{type(self.sampler).__name__} never ends, so its batches cannot be counted")
        return len(self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass, passed on to the samplers inside."""
        self._pass = epoch
        # What never ends goes on where the last pass was cut off, in place of another order for every pass.
        self.epoch = epoch = 0 if self.repeat or (self._endless and self.limit) else epoch
        for part in (self.batch_sampler, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a pass, whatever ``start`` is. TypeError when it never ends."""
        if self.limit is None:
            return self._all()
        return self.limit if self._endless else min(self.limit, self._all())

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        self.drawn = 0
        if start and not self.infinite and start > len(self):
            raise ValueError(
                f"cannot begin at batch {start}: this epoch has {len(self)}. Were the dataset, the batch size or the "
                "number of processes changed since the run was interrupted?"
            )
        for batch in self._limited(start):
            self.drawn += len(batch)
            yield batch

    def _limited(self, start: int) -> Iterator[list[int]]:
        if self.limit is None:
            yield from self._from(start)
        elif self.repeat:
            if self._first is None:
                self._first = list(islice(self._from(0), self.limit))
            yield from self._first[start:]
        else:
            batches = self._from(start + (self._pass * self.limit if self._endless else 0))
            yield from islice(batches, self.limit - start)
            if not self._endless and type(self.batch_sampler) is not BatchSampler:
                deque(batches, maxlen=0)  # it may keep, for the next pass, what a pass that is cut off had begun

    def _from(self, start: int) -> Iterator[list[int]]:
        if self._generator is not None:
            self._generator.manual_seed(derive_seed(self.seed, self.epoch, self.rank))
        position = done = 0
        # A limited pass over what never ends has its place from the beginning, wherever the sampler stands.
        jumps = start or (self._endless and self.limit is not None)
        if jumps and type(self.batch_sampler) is BatchSampler and hasattr(self.sampler, "skip"):
            position = start * self.batch_sampler.batch_size
            # The last batch of an epoch may be smaller than the others.
            self.sampler.skip(position if self._endless else min(position, len(self.sampler)))
            done = start
        for batch in self.batch_sampler:
            if done >= start:
                yield [self._draw(index, position + offset) for offset, index in enumerate(batch)]
            position += len(batch)
            done += 1

    def _draw(self, index: int, position: int) -> int:
        if not self.training or isinstance(index, Draw):
            return index
        return Draw(index, derive_seed(self.seed, self.epoch, position * self.world_size + self.rank))
