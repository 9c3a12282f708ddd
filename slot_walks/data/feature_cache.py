"""Features of the frozen backbone, computed once and read in every epoch: the backbone is 91 % of a training step.

A data set whose augmentation has few outcomes (none, or a flip of a central crop) has as many views of each picture,
and training on their features is training on the pictures. Random crops have too many: `crops` of them are kept then,
which is less augmentation than live pictures have.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from core.config.command.processes import all_or_none
from core.data import DerivedCache, derive_seed, hash_files, hash_state, preserved_random_state, seed_sample
from core.errors import ConfigError, VitrineError
from core.output.progress import Progress

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class FeatureCache:
    """Where features of training pictures are kept, and how; `SlotTrainer` takes one.

    Below `folder` every backbone, file list, reader setting and transform has a folder of its own, so that none is read
    as another.

    Args:
        folder: root; None: features stay in memory, of data whose samples depend on their index alone (`fixed`).
        dtype: `float32` keeps what the backbone gave; `float16` rounds to 11 bits, in half the space; `bfloat16` to 8.
        crops: views of a picture that is cropped at random.
        batch_size: pictures that the backbone sees at once.
        num_workers: processes that read pictures meanwhile.

    Raises:
        ValueError: unknown dtype, or fewer than one crop.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        dtype: str = "float16",
        crops: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"cache.dtype={dtype!r}: use {', '.join(_DTYPES)}")
        if crops is not None and crops < 1:
            raise ValueError(f"cache.crops={crops}: keep at least one crop of a picture")
        self.folder, self.dtype, self.crops = None if folder is None else Path(folder), _DTYPES[dtype], crops
        self.batch_size, self.num_workers = batch_size, num_workers

    def fill(
        self,
        dataset: Dataset,
        backbone: nn.Module,
        context: Callable[[], AbstractContextManager] = nullcontext,
        **provenance: Any,
    ) -> Dataset:
        """The data set with features in place of pictures; computes those that are missing, each process its share.

        Args:
            dataset: a reader of `slot_walks.data`, or one with `describe(index)` and a `transform` with `views()`.
            backbone: gives features `(B, N, C)` and has `grid(image)`.
            context: entered around the backbone, for its precision.
            provenance: what else the features depend on.

        Raises:
            ConfigError: augmentation with more outcomes than can be kept, and `crops` is not set; without a folder,
                data that are not `fixed`.
            VitrineError: the disk is too small, or features overflow the dtype.
        """
        if self.folder is None:
            return self._in_memory(dataset, backbone, context)
        views = Views(dataset, self.crops)
        ids = [f"{index}-{view}" for index in range(len(dataset)) for view in range(len(views))]
        backbone.eval()
        # A run from the cache goes on with the random numbers of one from pictures, whether it fills the cache or not.
        with all_or_none("keeping features"), preserved_random_state(), torch.no_grad(), context():
            example = views[0, 0]["image"][None]
            shape = (*backbone.grid(example), backbone.dim)
            provenance |= _origin(dataset, views, example, backbone) | {"dtype": str(self.dtype), "shape": shape}
            # The name is the content's: settings that are tried in turn do not overwrite each other.
            name = blake2b(repr(sorted(provenance.items())).encode(), digest_size=8).hexdigest()
            with DerivedCache(self.folder / name, provenance, ids=ids) as cache:
                self._check_space(len(cache.missing()), shape)  # of all processes together
                pictures = _Pictures(views, cache.missing(mine=True))
                loader = DataLoader(pictures, self.batch_size, num_workers=self.num_workers, collate_fn=_collate)
                for names, images in Progress().over(loader, f"features of {type(dataset).__name__}"):
                    features = backbone(images.to(_device(backbone))).unflatten(1, shape[:2])
                    cache.write(names, {"features": self._rounded(features)})
        cache.reload()
        cache.require_complete()
        return CachedFeatures(dataset, views, cache)

    def _in_memory(
        self, dataset: Dataset, backbone: nn.Module, context: Callable[[], AbstractContextManager]
    ) -> Dataset:
        if not getattr(dataset, "fixed", False):
            raise ConfigError(
                f"model.cache.folder=null keeps features of drawn scenes in memory; {type(dataset).__name__} is read "
                "from files: give a folder, or train on images with model.cache=null"
            )
        backbone.eval()
        kept = []
        with preserved_random_state(), torch.no_grad(), context():
            for index in range(len(dataset)):
                sample = dataset[index]
                image = sample["image"][None].to(_device(backbone))
                features = self._rounded(backbone(image)).unflatten(1, backbone.grid(image))[0].cpu()
                kept.append({"features": features, "sample_id": sample["sample_id"]})
        return _Kept(kept)

    def _rounded(self, features: Tensor) -> Tensor:
        kept = features.to(self.dtype)
        if not kept.isfinite().all():
            raise VitrineError(
                f"features reach {float(features.abs().max()):.3g}, which {self.dtype} does not hold: set "
                "model.cache.dtype=float32"
            )
        return kept

    def _check_space(self, records: int, shape: tuple[int, ...]) -> None:
        needed = records * self.dtype.itemsize * shape[0] * shape[1] * shape[2]
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise VitrineError(
                f"features of {records} views need {needed / 1e9:.1f} GB, {self.folder} has {free / 1e9:.1f} GB: give "
                "model.cache.folder= on another disk, or train on pictures with model.cache=null"
            )


class Views(Dataset):
    """All views of a data set's pictures: `views[index, view]` is a sample, `len` the number of views of one picture.

    Raises:
        ConfigError: see `FeatureCache.fill`.
    """

    def __init__(self, dataset: Dataset, crops: int | None = None) -> None:
        name = type(dataset).__name__
        transform = getattr(dataset, "transform", None)
        if not hasattr(transform, "views") or not hasattr(dataset, "describe"):
            raise ConfigError(
                f"{name} does not say how many views its pictures have (describe(index), transform.views()): train on "
                "pictures with model.cache=null"
            )
        self.transforms = transform.views()
        if self.transforms is None and crops is None:
            raise ConfigError(
                f"{name} is cropped at random, so its features cannot be kept: set model.cache.crops=8 for eight crops "
                "of each picture, or train on pictures with model.cache=null"
            )
        self.dataset, self.crops = dataset, crops

    def __len__(self) -> int:
        return self.crops if self.transforms is None else len(self.transforms)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, view = place
        if self.transforms is None:
            with preserved_random_state():
                seed_sample(derive_seed(index, view))
                return self.dataset[index]
        viewed = copy.copy(self.dataset)
        viewed.transform = self.transforms[view]
        return viewed[index]

    def choose(self) -> int:
        """A view as the transform would choose it: by the same number of torch's global generator."""
        if self.transforms is None:
            return int(torch.randint(self.crops, ()))
        return self.dataset.transform.choose()


class _Kept(Dataset):
    """Samples that are there already."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.samples[index])


class CachedFeatures(Dataset):
    """A training set that gives `features` `(h, w, C)` of a picture's view, and `sample_id`, without the picture."""

    def __init__(self, dataset: Dataset, views: Views, cache: DerivedCache) -> None:
        self.dataset, self.views, self.cache = dataset, views, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def describe(self, index: int) -> Path:
        """The file of a sample."""
        return self.dataset.describe(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.cache[f"{index}-{self.views.choose()}"]
        return {"features": record["features"], "sample_id": Path(self.describe(index)).stem}


class _Pictures(Dataset):
    """The pictures of views by their names in the cache."""

    def __init__(self, views: Views, names: list[str]) -> None:
        self.views, self.names = views, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[str, Tensor]:
        index, view = self.names[place].split("-")
        return self.names[place], self.views[int(index), int(view)]["image"]


def _collate(samples: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
    names, images = zip(*samples, strict=True)
    return list(names), torch.stack(images)


def _origin(dataset: Dataset, views: Views, example: Tensor, backbone: nn.Module) -> dict[str, Any]:
    """What features depend on: files, the reader's settings, its first picture as read here, transform and weights."""
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in backbone.state_dict().items()}
    files = [dataset.describe(index) for index in range(len(dataset))]
    return {
        "reader": type(dataset).__name__,
        "settings": _scalars(dataset),
        "files": hash_files(files, Path(files[0]).parent),
        "first": hash_state({"image": example}),
        "transform": repr(dataset.transform),
        "views": len(views),
        "backbone": type(backbone).__name__,
        # Numbers of heads and the like are in no weight.
        "architecture": hash_state({name: _scalars(module) for name, module in backbone.named_modules()}),
        "weights": hash_state(state),
    }


def _scalars(owner: object) -> dict[str, Any]:
    return {k: v for k, v in sorted(vars(owner).items()) if isinstance(v, (str, int, float, bool, type(None)))}


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
