"""What metrics of videos share: means of named figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Means(Metric):
    """Means of named figures over the videos that have them; what no video has is left out."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, figures: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.figures = tuple(figures)
        for state in ("total", "count"):
            self.add_state(state, torch.zeros(len(self.figures), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        """Counts one video."""
        for place, name in enumerate(self.figures):
            if name in values:
                self.total[place] += torch.as_tensor(values[name]).double().to(self.total.device)
                self.count[place] += 1

    def compute(self) -> dict[str, Tensor]:
        """Figure -> mean over videos."""
        means = dict(zip(self.figures, self.total / self.count, strict=True))
        had = {name: mean for (name, mean), count in zip(means.items(), self.count, strict=True) if count}
        return had or means


def check_videos(videos: Tensor) -> None:
    """Raises ValueError for what is not `(b, 3, f, H, W)`, float."""
    if videos.ndim != 5 or videos.shape[1] != 3 or not videos.is_floating_point():
        raise ValueError(f"videos are {tuple(videos.shape)} {videos.dtype}: (b, 3, f, H, W), float in [0, 1]")
