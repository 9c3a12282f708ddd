"""How well pixels are grouped into objects, without names for the groups: torchmetrics on contingency tables.

    score = ARI(foreground=True)
    score.update(slots.argmax(1), instances)        # both (B, H, W)
    score.compute()

States are sums over images, so several processes reduce them exactly and every image counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from core.errors import ConfigError, nearest
from core.metrics.contingency import (
    adjusted_rand,
    class_iou,
    contingency,
    covering,
    foreground_overlap,
    match_clusters,
    matched_overlap,
    pieces,
    present,
    recovered,
    without,
)

#: Figure -> from tables (B, I, J) to one number per image (B,). Label 0 of the truth is the background.
FIGURES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "ari": adjusted_rand,
    "fg_ari": lambda table: adjusted_rand(without(table)),
    "mbo": lambda table: covering(table, background=0),
    "msc": covering,
    "msc_fg": lambda table: covering(table, background=0),
    "ssc": lambda table: covering(table, weighted=True),
    "ssc_fg": lambda table: covering(table, background=0, weighted=True),
    "miou": matched_overlap,
    "recovery": recovered,
    "corloc": lambda table: (recovered(table) > 0).double(),
    "iou": lambda table: foreground_overlap(table)[0].amax(dim=1),
    "dice": lambda table: foreground_overlap(table)[1].amax(dim=1),
    "segments_in_use": lambda table: pieces(table, 0.01),
    "background_pieces": lambda table: pieces(table, 0.1, label=0),
}
# Figures that need no foreground: they are defined for every image.
_WHOLE = ("ari", "msc", "ssc", "iou", "dice", "segments_in_use", "background_pieces")
# What the released scorers of slot_walks count for an image without foreground; others pass such an image over.
_OFFICIAL_EMPTY = ("fg_ari", "msc_fg", "ssc_fg")

Protocol = Literal["standard", "official"]
Aggregate = Literal["image", "batch"]


class GroupingScores(Metric):
    """Several figures of `FIGURES` from one table per image.

    ari, fg_ari        adjusted Rand index of all pixels, and of those that are not background in the truth
    mbo                mean over true objects of the best IoU with a predicted segment
    msc, ssc           segmentation covering, plain and weighted by size; `_fg` leaves the background out
    miou               mean IoU of true objects under a one-to-one matching
    recovery, corloc   share of objects found with IoU above ½; share of images in which one is
    iou, dice          of the predicted segment that fits the foreground best, chosen for each figure by itself
    segments_in_use    segments with at least a hundredth of the image's pixels
    background_pieces  segments with at least a tenth of the background's pixels

    Args:
        figures: which.
        protocol: `standard` passes an image without foreground over in figures of the foreground and averages over
            images; `official` counts it as 1 in fg_ari and 0 in msc_fg and ssc_fg, and averages batches' means.
        aggregate: `image` or `batch`, in place of the protocol's.
        ignore: true label that is not counted, in truth and prediction alike; None: all are.
        draws: predictions per image, for models that draw at random; figures are means over draws, and with more
            than one there is a `_std` for each, the deviation between draws.

    Raises:
        ConfigError: unknown figure, protocol or aggregate; no figure; fewer than one draw.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        figures: Sequence[str] = ("ari", "fg_ari", "mbo"),
        protocol: Protocol = "standard",
        aggregate: Aggregate | None = None,
        ignore: int | None = None,
        draws: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name in figures:
            if name not in FIGURES:
                raise ConfigError(
                    f"there is no figure '{name}'{nearest(name, FIGURES)} (there are {', '.join(FIGURES)})"
                )
        if protocol not in ("standard", "official") or aggregate not in (None, "image", "batch"):
            raise ConfigError(
                f"protocol={protocol}, aggregate={aggregate}: use standard or official, and image or batch"
            )
        if not figures or draws < 1:
            raise ConfigError(f"figures={list(figures)}, draws={draws}: one of each at least")
        self.figures, self.protocol, self.ignore, self.draws = tuple(figures), protocol, ignore, draws
        self.aggregate = aggregate or ("batch" if protocol == "official" else "image")
        for state in ("total", "count"):
            zeros = torch.zeros(len(self.figures), draws, dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, void: Tensor | None = None) -> None:
        """Takes a batch.

        Args:
            prediction: segments, integer `(B, H, W)` (or `(B, draws, H, W)`), or float masks `(B, K, H, W)` (or
                `(B, draws, K, H, W)`) whose largest decides.
            target: true labels `(B, H, W)` integer, 0 for background; an axis of length 1 behind B is dropped.
            void: bool `(B, H, W)`: pixels that are not counted.

        Raises:
            ValueError: shapes do not fit.
        """
        target = _picture(target)
        segments = as_segments(prediction)
        segments = segments[:, None] if segments.ndim == 3 else segments
        if segments.ndim != 4 or segments.shape[1] != self.draws:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} holds {segments.shape[1] if segments.ndim == 4 else '?'} draws, "
                f"expected draws={self.draws}"
            )
        valid = None if void is None else ~_picture(void).bool()
        if self.ignore is not None:
            known = target != self.ignore
            valid = known if valid is None else known & valid
        for draw in range(self.draws):
            self._add(draw, contingency(target, segments[:, draw], valid=valid))

    def _add(self, draw: int, table: Tensor) -> None:
        counted = table.sum(dim=(1, 2)) > 0
        objects = present(table, background=0).any(dim=1)
        for place, name in enumerate(self.figures):
            values = FIGURES[name](table)
            whole = name in _WHOLE or (self.protocol == "official" and name in _OFFICIAL_EMPTY)
            kept = counted if whole else objects
            total, number = values.where(kept, 0).sum(), kept.sum()
            if self.aggregate == "batch":
                total, number = total / number.clamp(min=1), (number > 0).to(number)
            self.total[place, draw] += total
            self.count[place, draw] += number

    def compute(self) -> dict[str, Tensor]:
        """Figure -> mean; NaN for one that no image had."""
        means = self.total / self.count
        figures = {name: means[place].mean() for place, name in enumerate(self.figures)}
        if self.draws > 1:
            figures |= {f"{name}_std": means[place].std() for place, name in enumerate(self.figures)}
        return figures


class _OneScore(GroupingScores):
    """One figure as a number."""

    def compute(self) -> Tensor:
        """The mean over images."""
        return super().compute()[self.figures[0]]


class ARI(_OneScore):
    """Adjusted Rand index; with `foreground` over the pixels of true objects (FG-ARI). See `GroupingScores`."""

    def __init__(self, foreground: bool = False, **options: Any) -> None:
        super().__init__(["fg_ari" if foreground else "ari"], **options)


class BestOverlap(_OneScore):
    """Mean best overlap (mBO): of instances or classes, whichever the truth has. See `GroupingScores`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(["mbo"], **options)


class SegCover(_OneScore):
    """Segmentation covering, weighted by size or not, with or without the background. See `GroupingScores`."""

    def __init__(self, weighted: bool = False, foreground: bool = False, **options: Any) -> None:
        super().__init__([("ssc" if weighted else "msc") + ("_fg" if foreground else "")], **options)


class ForegroundIoU(GroupingScores):
    """`iou` and `dice` of the foreground with the best segment of every image. See `GroupingScores`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(["iou", "dice"], **options)


class ClusterMIoU(Metric):
    """Mean IoU of clusters that take the classes' names by matching, over a whole data set.

    Args:
        num_clusters: `P`.
        num_classes: `C`; classes that occur nowhere count 0.
        ignore: true label that is not counted.
        match: see `core.metrics.contingency.match_clusters`.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        num_clusters: int,
        num_classes: int,
        ignore: int | None = 255,
        match: Literal["auto", "hungarian", "majority"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.num_clusters, self.num_classes, self.ignore, self.match = num_clusters, num_classes, ignore, match
        self.add_state("table", torch.zeros(num_clusters, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Clusters and classes of the pixels, integer `(B, H, W)` each.

        Raises:
            ValueError: shapes differ, or labels are out of range.
        """
        valid = None if self.ignore is None else _picture(target) != self.ignore
        tables = contingency(_picture(target), _picture(prediction), self.num_classes, self.num_clusters, valid)
        self.table += tables.sum(dim=0).T

    def compute(self) -> Tensor:
        """The mean over classes."""
        return class_iou(self.table, match_clusters(self.table, self.match)).mean()


def as_segments(masks: Tensor) -> Tensor:
    """Segments `(..., H, W)` from integer ones (as they are) or from float masks `(..., K, H, W)` by argmax.

    Masks `(B, K, 1, H, W)`, with a channel axis of their own, are understood too.
    """
    if not masks.is_floating_point():
        return masks
    if masks.ndim >= 5 and masks.shape[-3] == 1:
        masks = masks.squeeze(-3)
    return masks.argmax(dim=-3)


def _picture(labels: Tensor) -> Tensor:
    """`(B, H, W)` from `(B, H, W)` or `(B, 1, H, W)`."""
    return labels.squeeze(1) if labels.ndim == 4 and labels.shape[1] == 1 else labels
