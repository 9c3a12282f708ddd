"""Codes of training images, encoded once: transformers never need the encoder.

Encoder and codebook are frozen from the end of the first phase on, so that the second phase, which trains the decoder
alone, and transformers, which are trained on codes, can start from the same checkpoint side by side. 256 codes take 512
bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.config.command.processes import all_or_none
from core.data import DerivedCache, derive_seed, hash_files, hash_state, preserved_random_state, seed_sample
from core.output.progress import Progress
from seqgan.models import Tokenizer


class CodeCache:
    """Where codes of a data set are kept; `TransformerTrainer` takes one.

    The folder remembers the tokenizer's fingerprint, the data set and its transform, and refuses to be read with
    others.

    Args:
        folder: of this cache alone.
        views: how often each image is read and augmented; one of them is drawn in every epoch.
        batch_size: images that the encoder sees at once.
        num_workers: processes that read images meanwhile.
        per_tokenizer: keep the codes of every tokenizer in a folder of its own below, in place of refusing others.

    Raises:
        ValueError: fewer than one view.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        views: int = 1,
        batch_size: int = 32,
        num_workers: int = 0,
        per_tokenizer: bool = False,
    ) -> None:
        if views < 1:
            raise ValueError(f"cache.views={views}: keep at least one view of an image")
        self.folder, self.views = Path(folder), views
        self.batch_size, self.num_workers, self.per_tokenizer = batch_size, num_workers, per_tokenizer

    def fill(self, dataset: Dataset, tokenizer: Tokenizer) -> CachedCodes:
        """The data set with codes in place of images; encodes those that are missing, each process its share.

        Args:
            dataset: gives `image` `(3, H, W)` in [-1, 1] and, with classes, `label`. With `source_files()`, the files
                that it reads, or `describe(index)`, the file of a sample, these are part of what the cache remembers.
            tokenizer: on its device; evaluated in float32.

        Raises:
            core.data.StaleCacheError: the folder holds codes of another tokenizer, data set or transform.
        """
        ids = [f"{index}-{view}" for index in range(len(dataset)) for view in range(self.views)]
        views = _Views(dataset, ids)
        small = torch.int16 if tokenizer.quantizer.size <= 1 << 15 else torch.int32
        device = tokenizer.quantizer.embedding.weight.device
        tokenizer.eval()
        # A run that fills the cache goes on with the random numbers of one that finds it filled.
        with all_or_none("keeping codes"), preserved_random_state():
            provenance = self._origin(dataset, views) | {"tokenizer": tokenizer.fingerprint(), "dtype": str(small)}
            folder = self.folder / provenance["tokenizer"][:16] if self.per_tokenizer else self.folder
            with DerivedCache(folder, provenance, ids=ids) as cache:
                missing = _Views(dataset, cache.missing(mine=True))
                loader = DataLoader(missing, self.batch_size, num_workers=self.num_workers, collate_fn=_collate)
                for names, images, labels in Progress().over(loader, f"codes of {type(dataset).__name__}"):
                    codes = tokenizer.encode(images.to(device)).to("cpu", small)
                    cache.write(names, {"codes": codes, "label": labels})
        cache.reload()
        cache.require_complete()
        return CachedCodes(cache, len(dataset), self.views)

    def _origin(self, dataset: Dataset, views: _Views) -> dict[str, Any]:
        """What images depend on: the reader, its settings and files, the transform; the first image as read here."""
        origin = {
            "reader": type(dataset).__name__,
            "settings": {k: v for k, v in sorted(vars(dataset).items()) if isinstance(v, (str, int, float, bool))},
            "transform": repr(getattr(dataset, "transform", None)),
            "images": len(dataset),
            "views": self.views,
            "first": hash_state({"image": views[0][1]}),
        }
        files = _source_files(dataset)
        if files:
            origin["files"] = hash_files(files, Path(files[0]).parent)
        return origin


def _source_files(dataset: Dataset) -> list[str]:
    """The files that a data set reads: what it says itself (archives, shards), else the file of every sample."""
    if hasattr(dataset, "source_files"):
        return dataset.source_files()
    return [dataset.describe(index) for index in range(len(dataset))] if hasattr(dataset, "describe") else []


class CachedCodes(Dataset):
    """Gives `codes` `(h, w)` int64 of one of an image's views, `label` and `sample_id`, without the image."""

    def __init__(self, cache: DerivedCache, images: int, views: int) -> None:
        self.cache, self.images, self.views = cache, images, views

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        record = self.cache[f"{index}-{view}"]
        return {"codes": record["codes"].long(), "label": int(record["label"]), "sample_id": str(index)}


class _Views(Dataset):
    """Images by their names in the cache, each view with its own seed."""

    def __init__(self, dataset: Dataset, names: list[str]) -> None:
        self.dataset, self.names = dataset, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[str, Tensor, int]:
        index, view = map(int, self.names[place].split("-"))
        with preserved_random_state():
            seed_sample(derive_seed(index, view))
            sample = self.dataset[index]
        return self.names[place], sample["image"], int(sample.get("label", 0))


def _collate(samples: list[tuple[str, Tensor, int]]) -> tuple[list[str], Tensor, Tensor]:
    names, images, labels = zip(*samples, strict=True)
    return list(names), torch.stack(images), torch.tensor(labels)
