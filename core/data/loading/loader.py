"""A dataloader config becomes a loader whose batches do not depend on its workers."""

import atexit
import inspect
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

from core.config.command.processes import total
from core.config.key import config_key
from core.data.loading.batch import CollateFetched, FailedBatch, LoadedBatch, collate
from core.data.loading.batching import ResumableBatchSampler
from core.data.loading.sampling import EvalSampler, TrainSampler
from core.data.loading.seeded import SeededDataset
from core.data.loading.seeds import derive_seed
from core.errors import ConfigError, nearest

_KEYS = (
    "dataset",
    "batch_size",
    "sampler",
    "batch_sampler",
    "drop_last",
    "collate_fn",
    "num_workers",
    "persistent_workers",
    "prefetch_factor",
    "pin_memory",
    "on_error",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
)


class Loader(DataLoader):
    """torch's DataLoader, yielding :class:`core.data.LoadedBatch`; made by :func:`build_loader`.

    It draws nothing from the global random generators, so how often a loader is iterated does not show in a run.

    Raises (while iterating):
        SampleError: a broken sample under ``on_error: raise``; the message names it, its notes hold the traceback.
    """

    batch_sampler: ResumableBatchSampler

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass."""
        self.batch_sampler.set_epoch(epoch)

    def skip_batches(self, count: int) -> None:
        """Begin the next pass, and only that, after ``count`` batches; they are not loaded."""
        self.batch_sampler.start = count

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches of one pass on this rank; None for a sampler that never ends."""
        return None if self.batch_sampler.infinite else len(self.batch_sampler)

    @property
    def samples(self) -> int:
        """Samples of a pass over all processes: those of the data set, or what the last limited pass has read.

        Collective where the loader is limited: every process has to call it.
        """
        sampler = self.batch_sampler
        return len(self.dataset) if sampler.limit is None else total(sampler.drawn)

    def close(self) -> None:
        """End persistent workers now; the next pass starts new ones."""
        iterator, self._iterator = self._iterator, None
        _end(iterator)

    def __iter__(self) -> Iterator[LoadedBatch]:
        sampler = self.batch_sampler
        self.generator.manual_seed(derive_seed(sampler.seed, sampler.epoch, sampler.rank, 0))
        batches = super().__iter__()
        _RUNNING.add(batches)
        return self._opened(batches)

    def _opened(self, batches: Iterator[LoadedBatch | FailedBatch]) -> Iterator[LoadedBatch]:
        try:
            for batch in batches:
                if isinstance(batch, FailedBatch):
                    raise batch.error
                yield batch
        except Exception:
            # The traceback keeps the iterator alive, and when the garbage collector frees it together with its queues
            # the workers are not told to end: torch then waits for seconds, and so does everything else.
            self.close()
            _end(batches)
            raise


_RUNNING: weakref.WeakSet = weakref.WeakSet()


def _end(iterator: Any) -> None:
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


@atexit.register
def _end_all() -> None:
    # Otherwise Python kills the workers, which torch reports as an accident.
    for iterator in list(_RUNNING):
        _end(iterator)


def build_loader(
    cfg: Mapping[str, Any],
    *,
    seed: int,
    training: bool,
    rank: int | None = None,
    world_size: int | None = None,
    limit: Sequence[int | float] = (),
    repeat: bool = False,
) -> Loader:
    """The loader of an mmengine-style dataloader config.

    Args:
        cfg: every object may be given as such or as a ``type:`` dict.

            - ``dataset``: map-style;
            - ``batch_size``: per process;
            - ``sampler``: TrainSampler or EvalSampler unless a ``type`` is given (``sampler: {repeats: 3}`` configures
              the default one); mmengine's, mmdet's and torch's samplers work too;
            - ``batch_sampler``: takes the place of fixed-size batches, as in mmdet;
            - ``drop_last``: leave out an incomplete last batch (default false);
            - ``collate_fn``: :func:`core.data.collate`; mmengine's ``pseudo_collate`` for mmengine's datasets;
            - ``num_workers`` (0), ``persistent_workers`` (true in training with workers), ``prefetch_factor``,
              ``pin_memory`` (true where there is CUDA), ``timeout``, ``multiprocessing_context``: as in torch;
            - ``worker_init_fn``: called with the worker's number in every worker;
            - ``on_error``: ``raise`` or ``skip`` broken samples (see SeededDataset).
        seed: of the run, the same on every rank.
        training: samples are shuffled and seeded by their draw; otherwise each is read once, seeded by its index.
        rank, world_size: in place of the process group's.
        limit, repeat: where a pass ends, and whether all are alike; see ResumableBatchSampler.

    Raises:
        ConfigError: unknown or missing keys, with the nearest existing name; samplers that cannot be divided among
            ranks; fewer samples than one batch with ``drop_last``; a share of a sampler that never ends as `limit`.
    """
    cfg = dict(cfg)
    _check_keys(cfg)
    dataset = _build_dataset(cfg["dataset"], cfg.get("on_error", "raise"), training)
    inner = _build_batch_sampler(cfg, dataset, seed, training, rank, world_size)
    try:
        batch_sampler = ResumableBatchSampler(inner, seed, training, rank, world_size, limit, repeat)
    except TypeError as error:
        raise ConfigError(f"{error}: limit them by a whole number, not by a share") from None
    _check_divided(batch_sampler)
    if training and not batch_sampler.infinite and len(batch_sampler) == 0:
        raise ConfigError(
            f"{type(dataset.dataset).__name__} has {len(dataset)} samples, which do not fill one batch of "
            f"{batch_sampler.batch_size} on each of {batch_sampler.world_size} processes, and drop_last is on"
        )
    workers = cfg.get("num_workers", 0)
    options = {key: cfg[key] for key in ("timeout", "multiprocessing_context") if key in cfg}
    if workers and cfg.get("prefetch_factor") is not None:
        options["prefetch_factor"] = cfg["prefetch_factor"]
    return Loader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=CollateFetched(_build_collate(cfg.get("collate_fn"), dataset.dataset)),
        num_workers=workers,
        persistent_workers=bool(workers) and cfg.get("persistent_workers", training),
        pin_memory=cfg.get("pin_memory", torch.cuda.is_available()),
        worker_init_fn=_WorkerStart(_as_function(cfg.get("worker_init_fn"))),
        generator=torch.Generator(),
        **options,
    )


def _check_keys(cfg: Mapping[str, Any]) -> None:

    for key in cfg:
        if key not in _KEYS:
            raise ConfigError(f"a dataloader has no key '{key}'{nearest(key, _KEYS)}")
    if "dataset" not in cfg:
        raise ConfigError("a dataloader needs a dataset")
    if "batch_size" not in cfg and not callable(getattr(cfg.get("batch_sampler"), "__iter__", None)):
        raise ConfigError("a dataloader needs a batch_size (samples per process)")


def _build_dataset(cfg: Any, on_error: str, training: bool) -> SeededDataset:
    from core.config.registry import DATASETS, build

    with config_key("dataset"):
        dataset = build(cfg, DATASETS)
        if hasattr(dataset, "full_init"):
            # mmengine's datasets may put off reading their annotations; workers should not each do it again.
            dataset.full_init()
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ConfigError(f"{type(dataset).__name__} is not a map-style data set: it has no length and items")
    if isinstance(dataset, SeededDataset):
        return dataset
    return SeededDataset(dataset, on_error=on_error, training=training)


def _build_batch_sampler(
    cfg: Mapping[str, Any],
    dataset: SeededDataset,
    seed: int,
    training: bool,
    rank: int | None,
    world_size: int | None,
) -> Iterable[list[int]]:
    given, drop_last = cfg.get("batch_sampler"), cfg.get("drop_last", False)
    if drop_last and not training:
        raise ConfigError("drop_last would leave samples out of the evaluation")
    if given is not None and not isinstance(given, Mapping):
        if cfg.get("sampler") is not None:
            raise ConfigError("a batch_sampler that is already built has its own sampler: leave 'sampler' out")
        batch_sampler = given
    else:
        place = {"rank": rank, "world_size": world_size}
        with config_key("sampler"):
            sampler = _build_sampler(cfg.get("sampler"), dataset, seed, training, drop_last, place)
        if given is None:
            batch_sampler = BatchSampler(sampler, cfg["batch_size"], drop_last)
        else:
            batch_sampler = _build_with(given, sampler=sampler, batch_size=cfg["batch_size"], drop_last=drop_last)
    return batch_sampler


def _build_sampler(
    cfg: Any, dataset: SeededDataset, seed: int, training: bool, drop_last: bool, place: Mapping[str, int | None]
) -> Any:
    if cfg is not None and not isinstance(cfg, Mapping):
        return cfg
    cfg = dict(cfg or {})
    cfg.setdefault("type", TrainSampler if training else EvalSampler)
    # mmengine's sampler pads by default, which would count samples twice in evaluation.
    return _build_with(cfg, dataset=dataset, seed=seed, drop_last=drop_last, round_up=training, **place)


def _build_with(cfg: Mapping[str, Any], **offers: Any) -> Any:
    """Build ``cfg`` with those of ``offers`` that its constructor takes and the config leaves open."""
    from core.config.registry import DATA_SAMPLERS, build, resolve

    target = resolve(cfg["type"], DATA_SAMPLERS)
    parameters = inspect.signature(target).parameters
    if "data_source" in parameters:  # torch's name for it
        offers["data_source"] = offers.get("dataset")
    taken = {key: value for key, value in offers.items() if key in parameters and key not in cfg}
    return build(cfg, DATA_SAMPLERS, **taken)


def _check_divided(batch_sampler: ResumableBatchSampler) -> None:
    undivided = (RandomSampler, SequentialSampler, SubsetRandomSampler)
    if batch_sampler.world_size > 1 and isinstance(batch_sampler.sampler, undivided):
        raise ConfigError(
            f"{type(batch_sampler.sampler).__name__} gives every process the same samples; "
            "use core.data.TrainSampler or core.data.EvalSampler"
        )


def _build_collate(cfg: Any, dataset: Any) -> Callable[[list[Any]], Any]:
    if cfg is not None:
        return _as_function(cfg)
    from mmengine.dataset import BaseDataset, pseudo_collate

    openmmlab = isinstance(dataset, BaseDataset) or type(dataset).__module__.split(".")[0] in ("mmengine", "mmdet")
    return pseudo_collate if openmmlab else collate


def _as_function(cfg: Any) -> Callable | None:
    """A callable from a config: classes are built, functions get the config's arguments."""
    if cfg is None or (callable(cfg) and not isinstance(cfg, (Mapping, str))):
        return cfg
    import mmengine.registry

    from core.config.registry import build, resolve

    cfg = {"type": cfg} if isinstance(cfg, str) else dict(cfg)
    name = cfg["type"]
    target = mmengine.registry.FUNCTIONS.get(name) if isinstance(name, str) and "." not in name else None
    target = target or resolve(name)
    if inspect.isclass(target):
        return build({**cfg, "type": target})
    arguments = {key: value for key, value in cfg.items() if key != "type"}
    return partial(target, **arguments) if arguments else target


class _WorkerStart:
    """What every worker does first."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker_id: int) -> None:
        _obey_parent_only()
        if "cv2" in sys.modules:
            sys.modules["cv2"].setNumThreads(0)
        if self.then is not None:
            self.then(worker_id)


def _obey_parent_only() -> None:
    """Leave SIGINT and SIGTERM to the main process, unless it is the one that sends SIGTERM.

    Ctrl-C and cluster managers signal every process of a job. The main process then finishes its step and saves; a
    worker that left by itself would break it off. But torch and Python end workers with SIGTERM and wait for them, so a
    worker must not be deaf to it either, nor keep a handler of the main process that it inherited.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (os.getppid(), 0):
            pass
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="terminate", daemon=True).start()
