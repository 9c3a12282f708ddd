"""The decoded training set on disk: images at their final size as uint8, mapped into memory.

Decoding and resizing a thousand images costs more than everything else that the loader does in an epoch, and gives the
same pixels every time as long as no random crop comes first. A thousand images of 224 x 224 take 151 MB.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import PIL
from torch.utils.data import DataLoader, Dataset

from core.config.command.processes import all_or_none
from core.data import DerivedCache, hash_files, preserved_random_state
from core.errors import ConfigError
from core.output.progress import Progress
from petl.data.listed import ListedImages
from petl.data.transforms import TransferTransform


class DecodedStore(Dataset):
    """A data set whose images are decoded and resized once; samples are equal to its own, bit for bit.

    In a config it stands around the data set, `dataset: {type: petl.data.DecodedStore, folder: cache/petl, dataset:
    {type: petl.data.VTAB1k, ...}}`; a trainer may also build it in `training_data`. It is filled when it is built, by
    every process its share, and goes on where an interrupted one stopped. Below `folder`, every list of files, size and
    interpolation has a folder of its own, so that none is read as another.

    Args:
        dataset: a reader of `petl.data` with a `TransferTransform` whose first step is not random.
        folder: where the pixels are kept.
        num_workers: processes that decode while the store is filled.
        raw: samples hold the pixels, uint8 `(3, S, S)`, and the trainer normalises the batch on its device with
            `TransferTransform.normalise`: a quarter of the bytes for loader and transfer. Without augmentation only.

    Raises:
        ConfigError: images that are cropped at random before they have their size, `raw` with augmentation, or another
            kind of data set.
    """

    def __init__(
        self, dataset: ListedImages, folder: str | os.PathLike[str], num_workers: int = 0, raw: bool = False
    ) -> None:
        transform = getattr(dataset, "transform", None)
        if not isinstance(dataset, ListedImages) or not isinstance(transform, TransferTransform):
            raise ConfigError(
                f"DecodedStore keeps what petl's transforms make: {type(dataset).__name__} with "
                f"{type(transform).__name__} cannot be kept; use it without a store"
            )
        if raw and transform.random:
            raise ConfigError(
                f"DecodedStore: raw=true leaves augmentation out, but aug={transform.aug}: set raw: false"
            )
        self.dataset, self.raw = dataset, raw
        self._ids = [str(index) for index in range(len(dataset))]
        provenance = self._provenance(transform)
        # The name is the content's: sizes that are tried in turn do not overwrite each other.
        name = blake2b(repr(sorted(provenance.items())).encode(), digest_size=8).hexdigest()
        with (
            all_or_none("decoding images"),
            preserved_random_state(),
            DerivedCache(Path(folder) / name, provenance, ids=self._ids) as cache,
        ):
            missing = _Decoded(dataset, cache.missing(mine=True))
            loader = DataLoader(missing, 32, num_workers=num_workers, collate_fn=list)
            for batch in Progress().over(loader, "decoded images"):
                cache.write([identity for identity, _ in batch], {"pixels": [pixels for _, pixels in batch]})
        cache.reload()
        cache.require_complete()
        self.cache = cache

    def _provenance(self, transform: TransferTransform) -> dict[str, Any]:
        files = self.dataset.source_files()
        return {
            "reader": type(self.dataset).__name__,
            "files": hash_files(dict.fromkeys(files), self.dataset.root),
            # Of arrays, the rows; of files, which of them, in which order.
            "names": blake2b("\n".join(self.dataset.names).encode(), digest_size=16).hexdigest(),
            "resize": transform.fixed_part,
            "pillow": PIL.__version__,
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.cache[self._ids[index]]["pixels"]
        return self.dataset.sample(index, pixels if self.raw else self.dataset.transform.finish(pixels))

    def __getattr__(self, name: str) -> Any:
        # num_classes, labels, origin, describe and whatever else a reader has
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _Decoded(Dataset):
    """Images at their final size by their names in the store."""

    def __init__(self, dataset: ListedImages, names: list[str]) -> None:
        self.dataset, self.names = dataset, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[str, Any]:
        index = int(self.names[place])
        return self.names[place], self.dataset.transform.decoded(self.dataset.image(index))
