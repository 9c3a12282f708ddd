"""Accuracy over those of ImageNet's classes that a test set has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from core.errors import ConfigError
from petl.data.domain import CLASSES, subset_classes


class SubsetAccuracy(MulticlassAccuracy):
    """Top-1 accuracy where only some classes can be predicted: the logits of the others are masked.

    `update(logits, labels)` takes `(B, num_classes)` and `(B,)`; labels are those of all classes.

    Args:
        classes: numbers of the classes, or a name in `petl.data.domain.VARIANTS` (`imagenet_a`, `imagenet_r`: the 200
            of each; the others have all 1,000).
        num_classes: of the logits.
        average: see torchmetrics; `micro` counts every image the same.
        further: see torchmetrics.

    Raises:
        ConfigError: no such variant, or classes that the logits do not have.
    """

    def __init__(
        self, classes: str | Sequence[int], num_classes: int = CLASSES, average: str = "micro", **further: Any
    ) -> None:
        super().__init__(num_classes=num_classes, average=average, **further)
        chosen = subset_classes(classes) if isinstance(classes, str) else list(classes)
        if chosen is not None and (not chosen or min(chosen) < 0 or max(chosen) >= num_classes):
            raise ConfigError(f"SubsetAccuracy: classes must be some of 0 to {num_classes - 1}, not {chosen!r:.80}")
        others = torch.ones(num_classes, dtype=torch.bool)
        others[torch.arange(num_classes) if chosen is None else torch.tensor(chosen)] = False
        self.register_buffer("others", others, persistent=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Takes the logits and labels of a batch."""
        super().update(preds.masked_fill(self.others, -torch.inf), target)
