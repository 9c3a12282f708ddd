"""Where in its data a run goes on whose batches are no longer those that the checkpoint counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import BatchSampler

from core.data.loading.batching import ResumableBatchSampler
from core.data.loading.sampling import TrainSampler


def joint_batch(loader: Any) -> int | None:
    """Samples in a step of all processes together; None where batches have no one size."""
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None)
    return None if size is None else size * getattr(sampler, "world_size", 1)


def place(saved: Mapping[str, Any], loader: Any, steps_per_epoch: int | None) -> tuple[int, int, str | None]:
    """Epoch and batches taken of it, in the batches that there are now.

    With our own sampler a batch begins at the very sample where the run was, if the samples taken make whole batches.
    Otherwise, and with samplers whose order depends on their batches, the run goes on with the next epoch.

    Args:
        saved: `epoch`, `batches_taken`, `steps_per_epoch` and `joint_batch` of a checkpoint.
        loader: of the run that goes on.
        steps_per_epoch: of it; None for a sampler that never ends.

    Returns:
        Epoch, batches, and what is to be said about it, if anything.
    """
    epoch, taken, before = saved["epoch"], saved["batches_taken"], saved.get("joint_batch")
    now = joint_batch(loader)
    same = (before, saved.get("steps_per_epoch")) == (now, steps_per_epoch)
    if same or "steps_per_epoch" not in saved or not taken:
        return epoch, taken, None
    said = f"a step has {now} samples and an epoch {steps_per_epoch} steps, not {before} and {saved['steps_per_epoch']}"
    if before and now and _in_order(loader) and before * taken % now == 0:
        taken = before * taken // now
        if steps_per_epoch is None or taken < steps_per_epoch:
            return epoch, taken, f"{said}: the epoch goes on at batch {taken}, with the same sample"
    if steps_per_epoch is None:
        return epoch, taken, f"{said}: the sampler goes on at batch {taken}, with another sample than before"
    return epoch + 1, 0, f"{said}: the run goes on at the beginning of epoch {epoch + 1}"


def _in_order(loader: Any) -> bool:
    """Whether batches are cut from an order that does not depend on their size."""
    sampler = getattr(loader, "batch_sampler", None)
    return (
        isinstance(sampler, ResumableBatchSampler)
        and type(sampler.batch_sampler) is BatchSampler
        and isinstance(sampler.sampler, TrainSampler)
    )
