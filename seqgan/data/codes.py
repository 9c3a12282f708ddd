"""Codes of training images, encoded once: transformers never need the encoder.

Encoder and codebook are frozen from the end of the first phase on, so that the second phase, which trains the decoder
alone, and transformers, which are trained on codes, can start from the same checkpoint side by side. 256 codes take 512
bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.data.derived import Derived, DerivedData
from seqgan.models import Tokenizer


class CodeCache(Derived):
    """Where codes of a data set are kept; `TransformerTrainer` takes one.

    The folder remembers the tokenizer's fingerprint, the data set and its transform, and refuses to be read with
    others.

    Args:
        folder: of this cache alone.
        views: how often each image is read and augmented; one of them is drawn in every epoch.
        per_tokenizer: keep the codes of every tokenizer in a folder of its own below, in place of refusing others.
        batch_size, num_workers, evaluation: see `core.data.Derived`.

    Raises:
        ValueError: fewer than one view.
    """

    what = "codes"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        views: int = 1,
        batch_size: int = 32,
        num_workers: int = 0,
        per_tokenizer: bool = False,
        evaluation: bool = False,
    ) -> None:
        super().__init__(folder, views, None, batch_size, num_workers, evaluation)
        self.per_tokenizer = per_tokenizer

    def place(self, origin: Mapping[str, Any]) -> Path:
        """The folder itself, or that of the tokenizer below it."""
        return self.folder / origin["tokenizer"][:16] if self.per_tokenizer else self.folder

    def fill(self, dataset: Dataset, tokenizer: Tokenizer, beside: bool = False) -> DerivedData:
        """The data set with `codes` `(h, w)` int64 and `label` in place of images, or beside them.

        Args:
            dataset: gives `image` `(3, H, W)` in [-1, 1] and, with classes, `label`.
            tokenizer: on its device; evaluated in float32.
            beside: whether samples keep their other entries.

        Raises:
            core.data.StaleCacheError: the folder holds codes of another tokenizer, data set or transform.
        """
        small = torch.int16 if tokenizer.quantizer.size <= 1 << 15 else torch.int32
        device = tokenizer.quantizer.embedding.weight.device
        tokenizer.eval()

        def codes(batch: dict[str, Any]) -> dict[str, Tensor]:
            image = batch["image"]
            label = batch.get("label", torch.zeros(len(image), dtype=torch.int64))
            return {"codes": tokenizer.encode(image.to(device)).to("cpu", small), "label": label}

        origin = {"tokenizer": tokenizer.fingerprint(), "dtype": str(small)}
        return self.keep(dataset, codes, origin, reads=("image", "label"), restore=_sample, beside=beside)


def _sample(record: dict[str, Tensor]) -> dict[str, Any]:
    return {"codes": record["codes"].long(), "label": int(record["label"])}
