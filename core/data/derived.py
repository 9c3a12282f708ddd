"""What a frozen network makes of a data set, computed once and read in every epoch: features, codes, latents.

A paper's trainer takes a `Derived` of its own as the argument ``cache``, and gives what `Derived.keep` returns in
`core.Trainer.training_data` and `evaluation_data`.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from core.config.command.processes import all_or_none
from core.data.cache import DerivedCache
from core.data.loading.seeds import derive_seed, preserved_random_state, seed_sample
from core.data.provenance import hash_files, hash_state
from core.errors import ConfigError, VitrineError
from core.output.progress import Progress

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: A batch of images and what is kept of it: name -> (B, ...).
Compute = Callable[[dict[str, Any]], Mapping[str, Tensor]]


class Derived:
    """Where derived data are kept, and how; a paper's class says in a method of its own what is computed.

    A transform with `views()` lists what it can make of an image, as transforms without chance (a crop and its mirror
    image, say), and `choose()` draws one of them. All of these are kept. Of a transform with too many outcomes
    (`views()` is None), or without such a method, `views` samples are kept, each drawn with its own seed.

    Args:
        folder: the root folder; None keeps everything in memory, of data whose samples depend on their index alone
            (`dataset.fixed`).
        views: number of samples that are kept of an image that is augmented at random; None refuses such data.
        dtype: precision in which floating-point values are kept: `float32`, `float16` (11 bits) or `bfloat16` (8 bits);
            None: as they are computed.
        batch_size: images that the network sees at once.
        num_workers: processes that read images meanwhile.
        evaluation: whether derived data take the network's place in evaluations, too; the images stay beside them.

    Raises:
        ValueError: an unknown dtype, or fewer than one view.
    """

    #: What is kept, and the argument that says how many views, for messages.
    what, count = "data", "view"

    def __init__(
        self,
        folder: str | os.PathLike | None,
        views: int | None = 1,
        dtype: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        evaluation: bool = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"cache.dtype={dtype!r}: use {', '.join(DTYPES)}")
        if views is not None and views < 1:
            raise ValueError(f"cache.{self.count}s={views}: keep at least one {self.count} of an image")
        self.folder, self.views = None if folder is None else Path(folder), views
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.batch_size, self.num_workers, self.evaluation = batch_size, num_workers, evaluation

    def place(self, origin: Mapping[str, Any]) -> Path:
        """The folder of data of this origin: below the root, named by all of it, so that no data are read as others."""
        return self.folder / blake2b(repr(sorted(origin.items())).encode(), digest_size=8).hexdigest()

    def keep(
        self,
        dataset: Dataset,
        compute: Compute,
        origin: Mapping[str, Any],
        *,
        reads: Sequence[str] = ("image",),
        context: Callable[[], AbstractContextManager] = nullcontext,
        restore: Callable[[dict[str, Tensor]], dict[str, Any]] = dict,
        beside: bool = False,
    ) -> DerivedData:
        """The data set with derived data; computes those that are missing, each process its share.

        Random numbers go on as if nothing had been computed, so a run that fills a cache equals one that finds it.

        Args:
            dataset: map-style, of samples with `image`. Files that it names, by `source_files()` or for every sample by
                `describe(index)`, are part of the origin.
            compute: batch -> what is kept of it, on any device.
            origin: what `compute` depends on, beside the data: numbers, texts and hashes; see `network_origin`.
            reads: entries of samples that `compute` gets, as far as a sample has them.
            context: is entered around `compute`, for its precision.
            restore: record -> entries of a sample.
            beside: whether samples keep their own entries (evaluation); else they are those of the record alone.

        Raises:
            ConfigError: images are augmented at random and `views` is None, or there is neither a folder nor `fixed`.
            VitrineError: the disk is too small, or values overflow the dtype.
            core.data.StaleCacheError: the folder holds data of another origin.
        """
        views = Views(dataset, self, 1 if beside else self.views)
        ids = [f"{index}-{view}" for index in range(len(dataset)) for view in range(len(views))]
        if self.dtype is not None:
            origin = {**origin, "dtype": str(self.dtype)}

        def computed(places: list[str], batch_size: int) -> Iterator[tuple[list[str], list[str], dict[str, Tensor]]]:
            loader = DataLoader(
                _Inputs(views, places, reads), batch_size, num_workers=self.num_workers, collate_fn=_collate
            )
            for names, samples, batch in Progress().over(loader, f"{self.what} of {type(dataset).__name__}"):
                yield names, samples, {field: self._rounded(value) for field, value in compute(batch).items()}

        with all_or_none(f"keeping {self.what}"), preserved_random_state(), torch.no_grad(), context():
            if self.folder is None:
                kept, samples = {}, []
                for names, given, values in computed(ids, batch_size=1):
                    kept[names[0]] = {field: value[0].cpu() for field, value in values.items()}
                    samples += given
                return DerivedData(dataset, views, kept, restore, beside, samples)
            origin = _data_origin(dataset, views) | origin
            with DerivedCache(self.place(origin), origin, ids=ids) as cache:
                for names, _, values in computed(cache.missing(mine=True), self.batch_size):
                    if not len(cache):
                        self._check_space(cache, values)
                    cache.write(names, values)
        cache.reload()
        cache.require_complete()
        return DerivedData(dataset, views, cache, restore, beside)

    def _rounded(self, values: Tensor) -> Tensor:
        if self.dtype is None or not values.is_floating_point():
            return values
        kept = values.to(self.dtype)
        if not kept.isfinite().all():
            raise VitrineError(
                f"{self.what} reach {float(values.abs().max()):.3g}, which {self.dtype} does not hold: set "
                "model.cache.dtype=float32"
            )
        return kept

    def _check_space(self, cache: DerivedCache, values: Mapping[str, Tensor]) -> None:
        records = len(cache.missing())  # of all processes together
        needed, free = records * sum(v[0].nbytes for v in values.values()), shutil.disk_usage(cache.folder).free
        if needed > free:
            raise VitrineError(
                f"{self.what} of {records} views need {needed / 1e9:.1f} GB, {self.folder} has {free / 1e9:.1f} GB: "
                "give model.cache.folder= on another disk, or train on images with model.cache=null"
            )


class Views(Dataset):
    """All views of a data set's images: `views[index, view]` is a sample, `len` the number of views of one image.

    Raises:
        ConfigError: see `Derived.keep`.
    """

    def __init__(self, dataset: Dataset, kept: Derived, views: int | None) -> None:
        name, transform = type(dataset).__name__, getattr(dataset, "transform", None)
        fixed = getattr(dataset, "fixed", False)
        if kept.folder is None and not fixed:
            raise ConfigError(
                f"model.cache.folder=null keeps {kept.what} of drawn scenes in memory; {name} is read from files: give "
                "a folder, or train on images with model.cache=null"
            )
        listed = hasattr(transform, "views")
        self.transforms = transform.views() if listed else [transform] if fixed else None
        if self.transforms is None and views is None:
            problem = (
                f"{name} is cropped at random, so its {kept.what} cannot be kept: set model.cache.{kept.count}s=8 for "
                f"eight {kept.count}s of each image"
                if listed
                else f"{name} does not say how many views its images have (transform.views()): set "
                f"model.cache.{kept.count}s"
            )
            raise ConfigError(f"{problem}, or train on images with model.cache=null")
        self.dataset, self.transform = dataset, transform if listed else None
        self.count = views if self.transforms is None else len(self.transforms)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, view = place
        dataset = self.dataset
        if self.transform is not None and self.transforms is not None:
            dataset = copy.copy(dataset)
            dataset.transform = self.transforms[view]
        with preserved_random_state():
            seed_sample(derive_seed(index, view))
            return dataset[index]

    def choose(self) -> int:
        """A view as the transform would choose it: by the same number of torch's global generator."""
        if self.transform is not None and self.transforms is not None:
            return self.transform.choose()
        return int(torch.randint(self.count, ())) if self.count > 1 else 0


class DerivedData(Dataset):
    """A data set whose samples are records of one of an image's views, with `sample_id`; all else is the data set's."""

    def __init__(
        self,
        dataset: Dataset,
        views: Views,
        cache: DerivedCache | Mapping[str, dict[str, Tensor]],
        restore: Callable[[dict[str, Tensor]], dict[str, Any]],
        beside: bool,
        names: Sequence[str] = (),
    ) -> None:
        self.dataset, self.views, self.cache, self.names = dataset, views, cache, names
        self.restore, self.beside = restore, beside

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.beside:
            own = dict(self.dataset[index])
        elif self.names:
            own = {"sample_id": self.names[index]}
        else:
            named = hasattr(self.dataset, "describe")
            own = {"sample_id": Path(self.dataset.describe(index)).stem if named else str(index)}
        return own | self.restore(self.cache[f"{index}-{self.views.choose()}"])


class _Inputs(Dataset):
    """Of views by their names in the cache: name, sample's name, and the entries that are read."""

    def __init__(self, views: Views, names: list[str], reads: Sequence[str]) -> None:
        self.views, self.names, self.reads = views, names, reads

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[str, str, dict[str, Any]]:
        index, view = map(int, self.names[place].split("-"))
        sample = self.views[index, view]
        read = {key: sample[key] for key in self.reads if key in sample}
        return self.names[place], str(sample.get("sample_id", index)), read


def _collate(samples: list[tuple[str, str, dict[str, Any]]]) -> tuple[list[str], list[str], dict[str, Any]]:
    names, given, read = zip(*samples, strict=True)
    return list(names), list(given), default_collate(list(read))


def network_origin(network: nn.Module) -> dict[str, Any]:
    """What decides a network's output: its class, its modules' settings and the hash of its weights."""
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in network.state_dict().items()}
    return {
        "network": type(network).__name__,
        # Numbers of heads and the like are in no weight.
        "architecture": hash_state({name: _settings(module) for name, module in network.named_modules()}),
        "weights": hash_state(state),
    }


def _data_origin(dataset: Dataset, views: Views) -> dict[str, Any]:
    """What images depend on: the reader, its settings and files, the transform; the first image as read here."""
    origin = {
        "reader": type(dataset).__name__,
        "settings": _settings(dataset),
        "transform": repr(getattr(dataset, "transform", None)),
        "images": len(dataset),
        "views": len(views),
        "first": hash_state({"image": views[0, 0]["image"]}),
    }
    if hasattr(dataset, "source_files"):  # archives and shards
        files = dataset.source_files()
    else:
        files = [dataset.describe(i) for i in range(len(dataset))] if hasattr(dataset, "describe") else []
    return origin | ({"files": hash_files(files, Path(files[0]).parent)} if files else {})


def _settings(owner: object) -> dict[str, Any]:
    return {k: v for k, v in sorted(vars(owner).items()) if isinstance(v, (str, int, float, bool))}
