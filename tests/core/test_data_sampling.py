"""Samplers: who is drawn, in which order, with which seed, on which rank; resuming inside an epoch."""

import pickle
from itertools import chain, islice

import pytest
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from core.data import Draw, EvalSampler, ResumableBatchSampler, TrainSampler, derive_seed


def draws(sampler, count=None):
    return [(int(draw), draw.seed) for draw in (islice(sampler, count) if count else sampler)]


def global_batches(length, world, batch, epoch=1, count=None, **options):
    """Batches of all ranks together: batch k as the set of (index, seed)."""
    per_rank = []
    for rank in range(world):
        sampler = TrainSampler(range(length), seed=7, rank=rank, world_size=world, **options)
        sampler.set_epoch(epoch)
        stream = draws(sampler, count and count * batch // world)
        size = batch // world
        per_rank.append([stream[i : i + size] for i in range(0, len(stream), size)])
    assert len({len(batches) for batches in per_rank}) == 1, "every rank takes equally many steps"
    return [sorted([*chain(*parts)]) for parts in zip(*per_rank, strict=True)]


def test_draw_is_its_index_and_survives_pickling():
    draw = pickle.loads(pickle.dumps(Draw(5, seed=2**62 + 1)))
    assert draw == 5 and isinstance(draw, Draw) and (["a"] * 5 + ["b"])[: draw + 1] == ["a"] * 5 + ["b"]
    assert draw.seed == 2**62 + 1
    assert hash(draw) == hash(5)


def test_seeds_depend_on_every_part_and_their_order():
    assert len({derive_seed(0, 1, 2), derive_seed(0, 2, 1), derive_seed(1, 0, 2), derive_seed(0, 1, 3)}) == 4
    assert derive_seed(3, 4) == derive_seed(3, 4)
    assert 0 <= derive_seed(-1) < 2**63


@pytest.mark.parametrize("world", [2, 3, 4, 6])
@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"repeats": 3}, {"infinite": True, "count": 9}])
def test_batches_are_those_of_one_process_for_any_world_size(world, options):
    single = global_batches(120, 1, 12, **options)
    assert global_batches(120, world, 12, **options) == single
    assert len(single) == options.get("count", 10)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_infinite_epochs_are_chained_without_padding(world):
    # 17 samples divide into nothing here; the chain still visits each of them once per 17 positions.
    single = draws(TrainSampler(range(17), infinite=True, rank=0, world_size=1), 17 * 4)
    shares = [draws(TrainSampler(range(17), infinite=True, rank=r, world_size=world), 60) for r in range(world)]
    merged = [draw for group in zip(*shares, strict=True) for draw in group]
    assert merged[: len(single)] == single
    for epoch in range(4):
        assert sorted(index for index, _ in single[epoch * 17 : (epoch + 1) * 17]) == list(range(17))
    assert len({seed for _, seed in single}) == len(single)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    def epoch(seed, number):
        sampler = TrainSampler(range(50), seed=seed, rank=0, world_size=1)
        sampler.set_epoch(number)
        return draws(sampler)

    assert epoch(1, 3) == epoch(1, 3)
    # Orders differ, not only the seeds of samples; with seed + epoch the last two would be the same.
    for one, other in (((1, 3), (1, 4)), ((0, 1), (1, 0))):
        (first, first_seeds), (second, second_seeds) = (zip(*epoch(*place), strict=True) for place in (one, other))
        assert first != second and not set(first_seeds) & set(second_seeds)
    assert sorted(index for index, _ in epoch(1, 3)) == list(range(50))


@pytest.mark.parametrize("options", [{}, {"infinite": True}, {"drop_last": True}, {"repeats": 3}])
def test_every_process_goes_on_behind_what_it_has_drawn(options):
    for rank in range(3):
        sampler = TrainSampler(range(17), seed=3, rank=rank, world_size=3, **options)
        whole = draws(sampler, 5)
        for start in range(5):
            sampler.skip(start)
            assert draws(sampler, 5 - start) == whole[start:]


def test_uneven_lengths_are_filled_from_the_beginning_or_cut():
    shares = [list(TrainSampler(range(10), shuffle=False, rank=r, world_size=4)) for r in range(4)]
    assert shares == [[0, 4, 8], [1, 5, 9], [2, 6, 0], [3, 7, 1]]
    cut = [list(TrainSampler(range(10), shuffle=False, rank=r, world_size=4, drop_last=True)) for r in range(4)]
    assert cut == [[0, 4], [1, 5], [2, 6], [3, 7]]
    tiny = [list(TrainSampler(range(2), shuffle=False, rank=r, world_size=5)) for r in range(5)]
    assert tiny == [[0], [1], [0], [1], [0]]
    # A sample that fills up is made anew, not repeated.
    first, *_ = TrainSampler(range(10), shuffle=False, rank=0, world_size=4)
    filled = list(TrainSampler(range(10), shuffle=False, rank=2, world_size=4))[2]
    assert first == filled and first.seed != filled.seed


def test_repeated_augmentation_puts_different_views_on_neighbouring_ranks():
    shares = [list(TrainSampler(range(30), repeats=3, rank=r, world_size=3)) for r in range(3)]
    assert [int(d) for d in shares[0]] == [int(d) for d in shares[1]] == [int(d) for d in shares[2]]
    assert all(len({d.seed for d in views}) == 3 for views in zip(*shares, strict=True))
    # An epoch costs as much as one without repeats, and visits a third of the samples.
    assert len(shares[0]) == 10 and len(set(shares[0])) == 10
    everything = list(TrainSampler(range(30), repeats=3, selected="all", rank=0, world_size=1))
    assert sorted(int(d) for d in everything) == sorted(list(range(30)) * 3)


def test_process_group_gives_rank_and_world_by_default():
    sampler = TrainSampler(range(4))
    assert (sampler.rank, sampler.world_size) == (0, 1)
    with pytest.raises(ValueError, match="both rank and world_size"):
        TrainSampler(range(4), rank=1)
    with pytest.raises(ValueError, match="outside a world of 2"):
        EvalSampler(range(4), rank=2, world_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repeats": 0}, "repeats"), ({"selected": "some"}, "'length' or 'all'")],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainSampler(range(4), **options)
    with pytest.raises(ValueError, match="empty"):
        TrainSampler([])


@pytest.mark.parametrize("length", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_sees_every_sample_exactly_once(length, world):
    samplers = [EvalSampler(range(length), rank=r, world_size=world) for r in range(world)]
    shares = [list(sampler) for sampler in samplers]
    assert sorted([*chain(*shares)]) == list(range(length))
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---------------------------------------------------------------------------- batches and resuming


class Buckets(BatchSampler):
    """Groups odd and even indices, as mmdet groups by aspect ratio: batches come out of order, positions do not."""

    def __iter__(self):
        buckets = [[], []]
        for index in self.sampler:
            bucket = buckets[index % 2]
            bucket.append(index)
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()
        rest = buckets[0] + buckets[1]
        while rest:
            yield rest[: self.batch_size]
            rest = rest[self.batch_size :]


def make(kind, length=23, epoch=2):
    samplers = {
        "ours": lambda: BatchSampler(TrainSampler(range(length), seed=3), 4, False),
        "ours, whole batches": lambda: BatchSampler(TrainSampler(range(length), seed=3, drop_last=True), 4, True),
        "ours, endless": lambda: BatchSampler(TrainSampler(range(length), seed=3, infinite=True), 4, False),
        "mmengine": lambda: BatchSampler(DefaultSampler(range(length), seed=3), 4, False),
        "mmengine, endless": lambda: BatchSampler(InfiniteSampler(range(length), seed=3), 4, False),
        "torch": lambda: BatchSampler(RandomSampler(range(length)), 4, False),
        "buckets": lambda: Buckets(DefaultSampler(range(length), seed=3), 4, False),
        "buckets of draws": lambda: Buckets(TrainSampler(range(length), seed=3), 4, False),
    }
    batches = ResumableBatchSampler(samplers[kind](), seed=3)
    batches.set_epoch(epoch)
    return batches


KINDS = [
    "ours",
    "ours, whole batches",
    "ours, endless",
    "mmengine",
    "mmengine, endless",
    "torch",
    "buckets",
    "buckets of draws",
]


def content(batches, count=20):
    return [[(int(draw), draw.seed) for draw in batch] for batch in islice(batches, count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_resumes_at_any_batch(kind):
    whole = content(make(kind))
    assert len(whole) == (20 if "endless" in kind else 5 if "whole" in kind else 6)
    for start in range(len(whole) if "endless" in kind else len(whole) + 1):
        batches = make(kind)
        batches.start = start
        assert content(batches, 20 - start) == whole[start:]
        assert batches.start == 0


@pytest.mark.parametrize("kind", ["ours", "mmengine", "torch", "buckets"])
def test_start_counts_for_one_pass_only(kind):
    batches = make(kind)
    batches.start = 3
    assert len(content(batches)) == 3
    assert content(batches) == content(make(kind))
    assert len(batches) == 6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "endless" not in kind])
def test_every_draw_has_its_own_seed_in_every_epoch(kind):
    seeds = [seed for epoch in (0, 1) for batch in content(make(kind, epoch=epoch)) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)
    assert content(make(kind, epoch=0)) != content(make(kind, epoch=1))


def test_indices_of_other_samplers_get_different_seeds_on_every_rank():
    seeds = []
    for rank in (0, 1):
        batches = ResumableBatchSampler([[0, 1], [2]], seed=1, rank=rank, world_size=2)
        seeds += [draw.seed for batch in batches for draw in batch]
    assert len(set(seeds)) == 6
    # Position n * W + r: the same as for a single process that draws the ranks' indices in turn.
    single = ResumableBatchSampler([[0, 0, 1, 1, 2, 2]], seed=1, rank=0, world_size=1)
    assert (
        seeds[:3] + seeds[3:]
        == [draw.seed for draw in next(iter(single))][::2] + [draw.seed for draw in next(iter(single))][1::2]
    )


def test_skipping_our_sampler_is_a_jump():
    sampler = TrainSampler(range(10**9), infinite=True, shuffle=False, rank=0, world_size=1)
    sampler.order = lambda epoch: range(10**9)  # the real order takes 8 GB
    batches = ResumableBatchSampler(BatchSampler(sampler, 100, False))
    batches.start = 3 * 10**9  # would take hours to walk
    assert [int(draw) for draw in next(iter(batches))[:3]] == [0, 1, 2]


def test_beginning_behind_the_end_says_what_may_have_changed():
    batches = make("buckets")
    batches.start = 7
    with pytest.raises(ValueError, match="cannot begin at batch 7: this epoch has 6"):
        next(iter(batches))


def test_evaluation_indices_stay_plain_and_endless_passes_have_no_length():
    batches = ResumableBatchSampler(BatchSampler(EvalSampler(range(5)), 2, False), training=False)
    assert not any(isinstance(index, Draw) for batch in batches for index in batch)
    with pytest.raises(TypeError, match="never ends"):
        len(make("ours, endless"))
    with pytest.raises(TypeError, match="never ends"):
        len(make("mmengine, endless"))
    assert make("ours, endless").infinite and not make("ours").infinite


def test_epoch_reaches_the_innermost_sampler():
    class Inner(Sampler):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(range(3))

        def __len__(self):
            return 3

    inner = Inner()
    ResumableBatchSampler(BatchSampler(inner, 2, False)).set_epoch(9)
    assert inner.epoch == 9
