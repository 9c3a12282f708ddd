"""Features of the frozen backbone, computed once and read in every epoch: the backbone is 91 % of a training step.

A data set whose augmentation has few outcomes (none, or a flip of a central crop) has as many views of each image,
and training on their features is training on the images. Random crops have too many: `crops` of them are kept then,
which is less augmentation than live images have.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.data.derived import Derived, DerivedData, network_origin


class FeatureCache(Derived):
    """Where features of images are kept, and how; `SlotTrainer` takes one.

    Below `folder` every backbone, file list, reader setting and transform has a folder of its own, so that none is read
    as another.

    Args:
        crops: views of an image that is cropped at random; None refuses random crops.
        folder, dtype, batch_size, num_workers, evaluation: see `core.data.Derived`.

    Raises:
        ValueError: unknown dtype, or fewer than one crop.
    """

    what, count = "features", "crop"

    def __init__(
        self,
        folder: str | os.PathLike | None,
        dtype: str = "float16",
        crops: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        evaluation: bool = False,
    ) -> None:
        super().__init__(folder, crops, dtype, batch_size, num_workers, evaluation)

    def fill(
        self,
        dataset: Dataset,
        backbone: nn.Module,
        context: Callable[[], AbstractContextManager] = nullcontext,
        beside: bool = False,
        **origin: Any,
    ) -> DerivedData:
        """The data set with `features` `(h, w, C)` in place of images, or beside them.

        Args:
            dataset: a reader of `slot_walks.data`, or one with a `transform` with `views()`.
            backbone: gives features `(B, N, C)` and has `grid(image)`.
            context: is entered around the backbone, for its precision.
            beside: whether samples keep image and label maps.
            origin: what else the features depend on.

        Raises:
            ConfigError, VitrineError: see `core.data.Derived.keep`.
        """
        device = next((t.device for t in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))
        backbone.eval()

        def features(batch: dict[str, Any]) -> dict[str, Tensor]:
            image = batch["image"].to(device)
            return {"features": backbone(image).unflatten(1, backbone.grid(image))}

        origin |= network_origin(backbone)
        return self.keep(dataset, features, origin, context=context, beside=beside)
