"""Loaders: the same batches whoever makes them, broken samples, resuming, other people's samplers."""

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.structures import InstanceData
from torch.utils.data import Dataset, IterableDataset, WeightedRandomSampler

from core.data import DevicePrefetcher, Draw, SampleError, SeededDataset, build_loader
from core.errors import ConfigError


class Noisy(Dataset):
    """Samples that show every random source; some of them broken."""

    classes = ("a", "b")

    def __init__(self, length=20, broken=(), named=False, log=None):
        self.length, self.broken, self.log = length, set(broken), log
        if named:
            self.describe = lambda index: f"/data/{index}.jpg"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.log is not None:
            self.log.append(index)
        if index in self.broken:
            raise ValueError("bad pixels")
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"index": index, "noise": torch.tensor(noise, dtype=torch.float64), "sample_id": str(index)}


def loader(dataset=None, training=True, seed=5, rank=None, world_size=None, **cfg):
    cfg = {"dataset": dataset if dataset is not None else Noisy(), "batch_size": 4, **cfg}
    return build_loader(cfg, seed=seed, training=training, rank=rank, world_size=world_size)


def content(batches):
    return [None if b.data is None else (b.data["index"].tolist(), b.data["noise"].tolist()) for b in batches]


# ---------------------------------------------------------------------------- determinism


@pytest.mark.child
@pytest.mark.parametrize("sampler", [None, {"type": "DefaultSampler", "shuffle": True}])
@pytest.mark.parametrize("training", [True, False])
def test_batches_do_not_depend_on_the_number_of_workers(training, sampler):
    def epochs(workers):
        made = loader(training=training, sampler=sampler, num_workers=workers)
        result = []
        for epoch in (0, 1):
            made.set_epoch(epoch)
            result.append(content(made))
        return result

    alone = epochs(0)
    assert epochs(1) == alone and epochs(2) == alone
    assert len(alone[0]) == 5
    if training:
        assert alone[0] != alone[1], "epochs differ in training"
    else:
        noise = [epoch[0][1] for epoch in alone]
        assert noise[0] == noise[1] or sampler is not None, "evaluation repeats"


def test_random_sources_of_one_sample_are_not_copies_of_each_other():
    noise = torch.cat([batch.data["noise"] for batch in loader(Noisy(400))])
    assert noise.unique().numel() == noise.numel()
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.2


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.child)])
def test_two_ranks_together_make_the_batches_of_one(workers):
    single = content(loader(Noisy(24), batch_size=6))
    ranks = [content(loader(Noisy(24), batch_size=3, rank=r, world_size=2, num_workers=workers)) for r in (0, 1)]
    for whole, first, second in zip(single, *ranks, strict=True):
        assert sorted(zip(*whole, strict=True)) == sorted([*zip(*first, strict=True), *zip(*second, strict=True)])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.child)])
def test_the_loader_draws_nothing_from_the_global_generators(workers):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    made = loader(num_workers=workers)
    content(made), content(made)
    observed = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert observed == (random.random(), np.random.rand(), torch.rand(()).item())


def test_seeds_of_runs_differ():
    assert content(loader(seed=1)) != content(loader(seed=2))
    assert content(loader(seed=1)) == content(loader(seed=1))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.child)])
def test_resuming_inside_an_epoch_loads_only_what_is_left(workers):
    whole, log = content(loader()), []
    for start in (0, 2, 5):
        made = loader(Noisy(log=log), num_workers=workers)
        made.skip_batches(start)
        log.clear()
        assert content(made) == whole[start:]
        if workers == 0:
            assert len(log) == 20 - 4 * start
        assert content(made) == whole, "the next pass is whole again"


@pytest.mark.child
def test_persistent_workers_start_a_new_pass_after_an_unfinished_one():
    made = loader(num_workers=2, persistent_workers=True)
    whole = content(made)
    assert content(islice(made, 2)) == whole[:2]
    assert content(made) == whole


# ---------------------------------------------------------------------------- broken samples


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.child)])
def test_a_broken_sample_is_an_error_that_names_it(workers):
    made = loader(Noisy(broken=[7], named=True), num_workers=workers)
    with pytest.raises(SampleError) as caught:
        content(made)
    assert str(caught.value) == "Noisy[7] (/data/7.jpg): ValueError: bad pixels"
    assert "Traceback" in "".join(caught.value.__notes__) and "__getitem__" in "".join(caught.value.__notes__)


def test_the_cause_is_chained():
    with pytest.raises(SampleError) as caught:
        SeededDataset(Noisy(broken=[3]))[Draw(3, seed=1)]
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_file_is_known_from_the_error_or_from_the_dataset():
    class Files(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return open("/nowhere/image.jpg").read()

    with pytest.raises(SampleError, match=r"Files\[1\] \(/nowhere/image.jpg\): FileNotFoundError"):
        SeededDataset(Files())[1]
    Files.get_data_info = lambda self, index: {"img_path": f"coco/{index}.jpg"}
    Files.__getitem__ = lambda self, index: 1 / 0
    with pytest.raises(SampleError, match=r"Files\[0\] \(coco/0.jpg\): ZeroDivisionError"):
        SeededDataset(Files())[0]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.child)])
def test_training_replaces_broken_samples_and_reports_them(workers):
    made = loader(Noisy(broken=[7, 8, 19]), on_error="skip", num_workers=workers)
    batches = list(made)
    assert [len(batch.data["index"]) for batch in batches] == [4] * 5
    errors = [error for batch in batches for error in batch.errors]
    # 7 is replaced by 9 over the broken 8, 19 by 0 behind the end.
    assert sorted((error.index, error.substitute) for error in errors) == [(7, 8), (8, 9), (8, 9), (19, 0)]
    assert all(error.message == "ValueError: bad pixels" and error.dataset == "Noisy" for error in errors)
    drawn = sorted(index for batch in batches for index in batch.data["index"].tolist())
    assert drawn == sorted([*(set(range(20)) - {7, 8, 19}), 9, 9, 0])
    assert content(made) == content(loader(Noisy(broken=[7, 8, 19]), on_error="skip"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.child)])
def test_evaluation_leaves_broken_samples_out_and_reports_them(workers):
    made = loader(Noisy(10, broken=[1, 4, 5, 6, 7]), training=False, on_error="skip", num_workers=workers)
    batches = list(made)
    assert [b.data and b.data["index"].tolist() for b in batches] == [[0, 2, 3], None, [8, 9]]
    assert [[error.index for error in b.errors] for b in batches] == [[1], [4, 5, 6, 7], []]
    assert all(error.substitute is None for b in batches for error in b.errors)
    with pytest.raises(SampleError, match=r"Noisy\[4\]"):
        made.dataset[4]


@pytest.mark.parametrize("broken", [range(20), range(2, 20)])
def test_too_many_broken_samples_in_a_row_raise_after_all(broken):
    with pytest.raises(SampleError, match="17 samples in a row cannot be read"):
        content(loader(Noisy(broken=broken), on_error="skip"))


def test_running_out_of_memory_is_no_broken_sample():
    class Hungry(Noisy):
        def __getitem__(self, index):
            raise MemoryError

    with pytest.raises(MemoryError):
        content(loader(Hungry(), on_error="skip"))


# ---------------------------------------------------------------------------- seeded dataset


def test_attributes_reach_the_inner_dataset_but_special_methods_do_not():
    class Batched(Noisy):
        def __getitems__(self, indices):
            raise AssertionError("would go around the seeding")

    seeded = SeededDataset(Batched())
    assert seeded.classes == ("a", "b") and len(seeded) == 20
    with pytest.raises(AttributeError):
        seeded.nothing  # noqa: B018
    content(loader(Batched()))


def test_plain_indices_are_seeded_in_evaluation_only():
    evaluation, training = SeededDataset(Noisy(), training=False), SeededDataset(Noisy())
    assert torch.equal(evaluation[3]["noise"], evaluation[3]["noise"])
    assert not torch.equal(evaluation[3]["noise"], evaluation[4]["noise"])
    assert not torch.equal(training[3]["noise"], training[3]["noise"])
    assert torch.equal(training[Draw(3, 1)]["noise"], training[Draw(3, 1)]["noise"])
    assert not torch.equal(training[Draw(3, 1)]["noise"], training[Draw(3, 2)]["noise"])


def test_streams_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="Stream is not map-style"):
        SeededDataset(Stream())


# ---------------------------------------------------------------------------- config


def test_objects_are_built_from_their_types():
    made = (
        loader({"type": "core.data.TarShards", "urls": []})
        if False
        else loader(
            sampler={"repeats": 2},
            collate_fn={"type": "core.data.Collate", "lists": ["noise"]},
            drop_last=True,
            batch_size=6,
        )
    )
    batches = list(made)
    assert len(batches) == made.steps_per_epoch == len(made) == 3
    assert isinstance(batches[0].data["noise"], list)
    indices = [index for batch in batches for index in batch.data["index"].tolist()]
    assert indices[::2] == indices[1::2]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"num_worker": 2}, "no key 'num_worker': did you mean 'num_workers'"),
        ({"sampler": {"type": "core.data.TrainSampler", "repeat": 2}}, "no argument 'repeat': did you mean 'repeats'"),
        ({"sampler": {"type": "core.data.TranSampler"}}, "did you mean 'TrainSampler'"),
        ({"batch_size": 64, "drop_last": True}, "20 samples, which do not fill one batch of 64"),
    ],
)
def test_mistakes_in_a_config_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        loader(**cfg)


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="needs a dataset"):
        build_loader({"batch_size": 1}, seed=0, training=True)
    with pytest.raises(ConfigError, match="needs a batch_size"):
        build_loader({"dataset": Noisy()}, seed=0, training=True)
    with pytest.raises(ConfigError, match="leave samples out"):
        loader(training=False, drop_last=True)


def test_endless_training_has_no_length():
    made = loader(sampler={"infinite": True})
    assert made.steps_per_epoch is None
    with pytest.raises(TypeError):
        len(made)
    assert len(list(islice(made, 12))) == 12


# ---------------------------------------------------------------------------- other people's parts


class Boxes(BaseDataset):
    """A detection dataset as OpenMMLab writes them."""

    METAINFO: ClassVar = {"classes": ("thing",)}

    def load_data_list(self):
        return [{"img_path": f"{i}.jpg", "width": 10 + i, "height": 15} for i in range(12)]

    def prepare_data(self, index):
        size = (3, 4 + index, 5)
        instances = InstanceData(bboxes=torch.rand(index + 1, 4))
        return {"inputs": torch.rand(size), "data_samples": instances, "index": index}


@pytest.mark.parametrize("sampler", [None, {"type": "DefaultSampler", "shuffle": True}])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.child)])
def test_openmmlab_datasets_and_batch_samplers_work(workers, sampler):
    import core.config.mmcv_ops  # noqa: F401  (mmdet needs it)

    def run(workers, start=0):
        made = loader(
            Boxes(lazy_init=True, serialize_data=False),
            batch_sampler={"type": "mmdet.AspectRatioBatchSampler"},
            sampler=sampler,
            batch_size=3,
            num_workers=workers,
        )
        made.skip_batches(start)
        return [(b.data["index"], [item.bboxes for item in b.data["data_samples"]]) for b in made]

    whole = run(0)
    assert equal(run(workers), whole) and equal(run(workers, start=2), whole[2:])
    assert sorted([i for indices, _ in whole for i in indices]) == list(range(12))
    assert loader(Boxes(), batch_size=2).dataset.metainfo["classes"] == ("thing",)


def equal(left, right):
    return len(left) == len(right) and all(
        a == b and all(torch.equal(x, y) for x, y in zip(p, q, strict=True))
        for (a, p), (b, q) in zip(left, right, strict=True)
    )


def test_mmengine_sampler_counts_nothing_twice_in_evaluation():
    shares = []
    for rank in (0, 1):
        made = loader(Noisy(9), training=False, sampler={"type": "DefaultSampler", "shuffle": False})
        sampler = made.batch_sampler.sampler
        assert isinstance(sampler, DefaultSampler) and sampler.round_up is False
        sampler.rank, sampler.world_size = rank, 2
        shares += [index for batch in made for index in batch.data["index"].tolist()]
    assert sorted(shares) == list(range(9))


def test_torch_samplers_are_repeatable_and_refused_where_they_do_not_divide():
    def run(seed):
        torch.manual_seed(seed)
        return content(loader(sampler=WeightedRandomSampler([1.0] * 20, 12)))

    assert run(1) == run(2), "the order follows the run's seed, not the global generator"
    with pytest.raises(ConfigError, match="RandomSampler gives every process the same samples"):
        loader(sampler={"type": "torch.utils.data.RandomSampler"}, rank=0, world_size=2)
    shuffled = content(loader(sampler={"type": "torch.utils.data.RandomSampler"}))
    assert sorted(index for indices, _ in shuffled for index in indices) == list(range(20))


@pytest.mark.child
def test_workers_leave_signals_to_the_main_process():
    class Signalled(Noisy):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return super().__getitem__(index)

    assert content(loader(Signalled(), num_workers=1)) == content(loader())


@pytest.mark.child
def test_workers_obey_the_main_process():
    def work(ready, start):
        start(0)
        os.kill(os.getpid(), signal.SIGTERM)
        while signal.SIGTERM in signal.sigpending():  # two that are pending at once would be one
            time.sleep(0.01)
        ready.set()
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready, loader(num_workers=1).worker_init_fn), daemon=True)
    worker.start()
    assert ready.wait(300) and worker.is_alive()
    worker.terminate()
    worker.join(300)
    assert worker.exitcode == -signal.SIGTERM


@pytest.mark.child
@pytest.mark.parametrize("prefetched", [False, True])
def test_workers_end_at_once_after_an_error(prefetched, monkeypatch):
    class Still:
        start = finish = staticmethod(lambda data: data)

    def run():
        made = loader(Noisy(broken=[7]), num_workers=2)
        with pytest.raises(SampleError):
            list(DevicePrefetcher(made, "cpu", transfer=Still()) if prefetched else made)

    # torch waits this long for each worker that does not answer: a busy machine is not taken for one.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 120)
    begin = time.monotonic()
    run()
    gc.collect()
    assert time.monotonic() - begin < 100


@pytest.mark.child
def test_a_process_ends_though_its_workers_are_alive():
    script = """if True:
        import signal, torch
        from core.data import build_loader
        signal.signal(signal.SIGTERM, lambda *_: None)  # workers inherit it

        class Numbers(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, index): return {"x": index}

        loader = build_loader({"dataset": Numbers(), "batch_size": 2, "num_workers": 2}, seed=0, training=True)
        batches = iter(loader)
        next(batches)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.child
def test_worker_init_fn_runs_in_every_worker():
    started = torch.zeros(2).share_memory_()

    def note(worker):
        started[worker] += 1

    content(loader(num_workers=2, worker_init_fn=note))
    assert started.tolist() == [1, 1]
