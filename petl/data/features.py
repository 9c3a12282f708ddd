"""Features of what is frozen in a tuned network, kept on disk in place of images (section 12)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from core.data.derived import Derived, DerivedData
from core.data.provenance import hash_state
from petl.models.prefix import FrozenPrefix


class PrefixFeatures(Derived):
    """Where features of the frozen prefix are kept; `TransferTrainer` takes one as `cache`.

    Args:
        folder, dtype, batch_size, num_workers, evaluation: see `core.data.Derived`.
        views: samples that are kept of an image that is augmented at random; None refuses such data.
    """

    what, count = "features", "view"

    def __init__(
        self,
        folder: str | os.PathLike | None,
        dtype: str = "float32",
        views: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        evaluation: bool = True,
    ) -> None:
        super().__init__(folder, views, dtype, batch_size, num_workers, evaluation)

    def fill(
        self,
        dataset: Dataset,
        prefix: FrozenPrefix,
        context: Callable[[], AbstractContextManager] = nullcontext,
        *,
        beside: bool = False,
    ) -> DerivedData:
        """The data set with `features` and `label` in place of images, or beside them.

        Args:
            dataset: map-style, with `image` and `label`.
            prefix: of the network.
            context: is entered around the network, for its precision.
            beside: whether samples keep their own entries.

        Raises:
            ConfigError, VitrineError: see `core.data.Derived.keep`.
        """
        backbone = prefix.model.backbone
        device = next(backbone.parameters()).device
        mode = backbone.training
        backbone.eval()

        def features(batch: dict[str, Any]) -> dict[str, Tensor]:
            return {"features": prefix.features(batch["image"].to(device)), "label": batch["label"]}

        origin = {
            "network": type(backbone).__name__,
            "depth": prefix.depth,
            "weights": hash_state({name: value.detach().cpu() for name, value in prefix.state().items()}),
        }
        try:
            return self.keep(dataset, features, origin, reads=("image", "label"), context=context, beside=beside)
        finally:
            backbone.train(mode)
