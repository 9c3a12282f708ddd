"""Evaluators of foreground extraction and object discovery; semantic segmentation has a module of its own.

The scores are `core.metrics.GroupingScores`; here is which of them a task reports, under which protocol and name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import MeanMetric

from core.config.registry import METRICS
from core.errors import ConfigError
from core.metrics import ARI, BestOverlap, ClusterMIoU, ForegroundIoU, GroupingScores, SegCover, TorchMetrics
from core.metrics.grouping import Aggregate, Protocol
from core.metrics.predictions import batches

__all__ = [
    "ARI",
    "BestOverlap",
    "ClusterMIoU",
    "ForegroundExtraction",
    "ForegroundIoU",
    "ObjectDiscovery",
    "SegCover",
]

_DISCOVERY: Mapping[str, Sequence[str]] = {
    "standard": (
        *("ari", "fg_ari", "mbo", "miou", "recovery", "corloc"),
        *("segments_in_use", "background_pieces"),  # whether slots bind
    ),
    # The released code knows class masks only, so that what it compares is no mBO of instances.
    "official": ("ari", "fg_ari", "msc", "ssc", "msc_fg", "ssc_fg"),
}


@METRICS.register_module()
class ForegroundExtraction(TorchMetrics):
    """`iou`, `dice` and `ari` of the foreground (section 6.1 of the recipe).

    Of the slots of an image the best one counts, for IoU and Dice each by itself: an oracle's choice, which all papers
    of this task make.

    Args:
        protocol: `standard` averages over images, `official` over the means of batches.
        prediction: key of the segments `(B, H, W)`, or `(B, draws, H, W)`.
        target: key of the foreground `(B, H, W)`, 0 or 1.
        draws: predictions per image; with several each figure has its deviation, `iou_std`, ...
        aggregate: `image` or `batch`, in place of the protocol's.
        prefix: in front of all names.
        check_size: more samples than the data set has are an error.
    """

    def __init__(
        self,
        protocol: Protocol = "standard",
        prediction: str = "segments",
        target: str = "mask",
        draws: int = 1,
        aggregate: Aggregate | None = None,
        prefix: str = "",
        check_size: bool = True,
    ) -> None:
        scores = GroupingScores(("iou", "dice", "ari"), protocol, aggregate, draws=draws)
        metrics = {"foreground": scores}
        super().__init__(metrics, prediction, target, names={}, prefix=prefix, check_size=check_size)


@METRICS.register_module()
class ObjectDiscovery(TorchMetrics):
    """Agreement of segments with objects (section 6.2 of the recipe).

    `standard`: `ari`, `fg_ari`, `mbo_i`, `miou` (one-to-one), `recovery`, `corloc` of instances and `mbo_c` of classes,
    and how many segments are in use and share the background (`segments_in_use`, `background_pieces`);
    pixels that are void are not counted, images without an object are passed over. `official`: `ari`, `fg_ari`, `msc`,
    `ssc`, `msc_fg`, `ssc_fg` of the labels that the official chain gives, with its handling of images without objects
    and its mean of batches. The two are not comparable.

    Args:
        protocol: as above.
        prediction: key of the segments `(B, H, W)`, or `(B, draws, H, W)`.
        target: key of the instances `(B, H, W)`, 0 is background.
        classes: key of the classes `(B, H, W)`; None: there are none, and no `mbo_c`.
        void: key of the pixels that are not counted `(B, H, W)` bool; a batch may lack it.
        draws: predictions per image; with several each figure has its deviation, `fg_ari_std`, ...
        aggregate: `image` or `batch`, in place of the protocol's.
        means: keys of predictions `(B,)` whose means are reported, too.
        prefix: in front of all names.
        check_size: more samples than the data set has are an error.

    Raises:
        ConfigError: unknown protocol.
    """

    def __init__(
        self,
        protocol: Protocol = "standard",
        prediction: str = "segments",
        target: str = "mask",
        classes: str | None = "classes",
        void: str = "void",
        draws: int = 1,
        aggregate: Aggregate | None = None,
        means: Sequence[str] = (),
        prefix: str = "",
        check_size: bool = True,
    ) -> None:
        if protocol not in _DISCOVERY:
            raise ConfigError(f"ObjectDiscovery: protocol={protocol}; use standard or official")
        options = {"protocol": protocol, "aggregate": aggregate, "draws": draws}
        metrics = {"instances": GroupingScores(_DISCOVERY[protocol], **options)}
        inputs = {"instances": [prediction, target, void]}
        if classes is not None and protocol == "standard":
            metrics["classes"] = GroupingScores(("mbo",), **options)
            inputs["classes"] = [prediction, classes, void]
        for key in means:
            metrics[key], inputs[key] = MeanMetric(), [key]
        self.void = void
        names = {"instances/mbo": "mbo_i", "classes/mbo": "mbo_c"}
        super().__init__(metrics, inputs=inputs, names=names, prefix=prefix, check_size=check_size)

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Takes one batch, see `core.metrics.TorchMetrics`."""
        for predicted in batches(data_samples):
            known = self.void in predicted or (isinstance(data_batch, Mapping) and self.void in data_batch)
            super().process(data_batch, predicted if known else {**predicted, self.void: None})
