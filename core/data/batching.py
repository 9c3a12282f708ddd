"""Batches of draws, and resuming in the middle of an epoch."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import BatchSampler, Sampler

from core.data.sampling import Draw, rank_and_world
from core.data.seeds import derive_seed


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
    """

    def __init__(
        self,
        batch_sampler: Iterable[list[int]],
        seed: int = 0,
        training: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.training = training
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self.epoch = 0
        self.start = 0
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
    def infinite(self) -> bool:
        """Whether the sampler is known never to end."""
        from mmengine.dataset import InfiniteSampler

        sampler = self.sampler
        return isinstance(sampler, InfiniteSampler) or getattr(sampler, "infinite", False)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass, passed on to the samplers inside."""
        self.epoch = epoch
        for part in (self.batch_sampler, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole pass, whatever ``start`` is. TypeError when the sampler never ends."""
        if self.infinite:
            raise TypeError(f"{type(self.sampler).__name__} never ends, so its batches cannot be counted")
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        if start and not self.infinite and start > len(self):
            raise ValueError(
                f"cannot begin at batch {start}: this epoch has {len(self)}. Were the dataset, the batch size or the "
                "number of processes changed since the run was interrupted?"
            )
        if self._generator is not None:
            self._generator.manual_seed(derive_seed(self.seed, self.epoch, self.rank))
        position = done = 0
        if start and type(self.batch_sampler) is BatchSampler and hasattr(self.sampler, "skip"):
            position = start * self.batch_sampler.batch_size
            # The last batch of an epoch may be smaller than the others.
            self.sampler.skip(position if self.infinite else min(position, len(self.sampler)))
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
