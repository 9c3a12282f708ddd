"""Where a run goes on whose batches have another size: at the same sample where whole batches lead there."""

import pytest
import torch

from core.data import build_loader
from core.data.loading.position import joint_batch, place

COUNT = 48


class Numbers(torch.utils.data.Dataset):
    """Each sample is its index."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return {"number": index, "sample_id": str(index)}


def loader(batch, world=1, rank=0, **options):
    cfg = {"dataset": Numbers(), "batch_size": batch, **options}
    return build_loader(cfg, seed=3, training=True, rank=rank, world_size=world)


def saved(epoch, taken, one, steps="whole"):
    steps = len(one) if steps == "whole" else steps
    return {"epoch": epoch, "batches_taken": taken, "steps_per_epoch": steps, "joint_batch": joint_batch(one)}


def numbers(epoch, skip, batch, world=1, **options):
    """What all processes read from a place to the end of the epoch, step by step."""
    loaders = [loader(batch, world, rank, **options) for rank in range(world)]
    for one in loaders:
        one.set_epoch(epoch)
        one.skip_batches(skip)
    steps = zip(*loaders, strict=True)
    return [sorted(n for batch in step for n in batch.data["number"].tolist()) for step in steps]


def test_the_same_batches_stay_where_they_are():
    one = loader(4)
    assert joint_batch(one) == 4 and place(saved(2, 5, one), one, len(one)) == (2, 5, None)
    assert place({"epoch": 2, "batches_taken": 5}, loader(8), 6) == (2, 5, None)  # an old checkpoint does not say


@pytest.mark.parametrize(("batch", "world", "taken"), [(8, 1, 3), (2, 1, 12), (2, 2, 6), (4, 2, 3), (6, 1, 4)])
def test_the_epoch_goes_on_at_the_same_sample(batch, world, taken):
    before, after = loader(4), loader(batch, world)
    epoch, found, said = place(saved(1, 6, before), after, len(after))
    assert (epoch, found) == (1, taken) and (batch * world == 4 or "the same sample" in said)
    rest = [n for step in numbers(1, 6, 4) for n in step]
    assert sorted(n for step in numbers(1, taken, batch, world) for n in step) == sorted(rest)


@pytest.mark.parametrize(("batch", "world", "taken"), [(8, 1, 5), (5, 1, 4), (16, 2, 7)])
def test_where_no_whole_batches_lead_there_the_next_epoch_begins(batch, world, taken):
    after = loader(batch, world)
    epoch, found, said = place(saved(1, taken, loader(4)), after, len(after))
    assert (epoch, found) == (2, 0) and "beginning of epoch 2" in said


def test_between_two_epochs_nothing_is_left_out():
    after = loader(8)
    assert place(saved(3, 0, loader(4)), after, len(after)) == (3, 0, None)


def test_other_samplers_begin_the_next_epoch():
    after = loader(8, sampler={"type": "torch.utils.data.RandomSampler"})
    assert place(saved(1, 6, loader(4)), after, len(after))[:2] == (2, 0)


def test_an_endless_sampler_goes_on_in_its_line():
    endless = {"sampler": {"type": "core.data.TrainSampler", "infinite": True}}
    before, after = loader(4, **endless), loader(8, **endless)
    assert place(saved(0, 6, before, None), after, None)[:2] == (0, 3)
    assert place(saved(0, 5, before, None), after, None)[:2] == (0, 5)
