"""Unsupervised semantic segmentation (section 6.3 of the recipe): region vectors, k-means, matching, mean IoU.

A slot's region vector is the mean feature that the walk from the slot meets. Clustering the vectors of a whole data set
gives every slot a cluster, and its pixels with it. So of the pixels nothing has to be kept but how many of each class a
slot covers: painting them with clusters and counting gives the same numbers.
"""

from __future__ import annotations

import statistics
from typing import Any, Literal

import torch
from torch import Tensor

from core.config.registry import METRICS
from core.errors import ConfigError
from core.layers.clusters import KMeansStart, spherical_kmeans
from core.metrics.contingency import class_iou, contingency, match_clusters
from core.metrics.grouping import as_segments
from core.metrics.predictions import MetricError, NanCount, OwnMetric, batches, check_counts, gather, read


def cluster_table(labels: Tensor, counts: Tensor, clusters: int) -> Tensor:
    """Pixels of every cluster and class over a data set, `(P, C)` int64.

    Args:
        labels: cluster of every slot, `(B, K)`.
        counts: pixels of every slot and class, `(B, K, C)`.
        clusters: `P`.
    """
    table = torch.zeros(clusters, counts.shape[2], dtype=torch.int64, device=counts.device)
    return table.index_add_(0, labels.flatten(), counts.flatten(0, 1).long())


@METRICS.register_module()
class SemanticSegmentation(OwnMetric):
    """Mean IoU of classes after clustering the region vectors of all evaluated pictures.

    Figures, as means over the seeds of k-means, each with its deviation `_std` where there are several: `miou`, matched
    as `match` says; `miou_majority`; and `miou_hungarian` where there are as many clusters as classes. Classes that do
    not occur count 0. What comes out does not depend on the number of processes.

    Args:
        num_clusters: of k-means (21 for VOC, 27 for COCO-Stuff-27).
        num_classes: classes in the truth.
        prediction: key of the segments `(B, H, W)` (of several draws `(B, draws, H, W)` the first).
        regions: key of the region vectors `(B, K, C)`.
        target: key of the classes `(B, H, W)`.
        ignore: label that is not counted.
        match: `hungarian`, `majority`, or `auto`: the former where the numbers agree.
        init: start of k-means; `random` with one restart is the released one.
        restarts: of k-means, for each seed.
        seeds: how many.
        seed: the first of them.
        prefix: in front of all names.
        check_size: more samples than the data set has are an error.

    Raises:
        ConfigError: numbers or words that cannot be meant.
    """

    def __init__(
        self,
        num_clusters: int,
        num_classes: int,
        prediction: str = "segments",
        regions: str = "regions",
        target: str = "mask",
        ignore: int = 255,
        match: Literal["auto", "hungarian", "majority"] = "auto",
        init: KMeansStart = "kmeans++",
        restarts: int = 10,
        seeds: int = 5,
        seed: int = 0,
        prefix: str = "",
        check_size: bool = True,
    ) -> None:
        super().__init__(prefix=prefix)
        if min(num_clusters, num_classes, restarts, seeds) < 1:
            raise ConfigError("SemanticSegmentation: num_clusters, num_classes, restarts and seeds are at least 1")
        if match not in ("auto", "hungarian", "majority") or init not in ("kmeans++", "random"):
            raise ConfigError(
                f"SemanticSegmentation: match={match}, init={init}; use auto, hungarian or majority, and kmeans++ or "
                "random"
            )
        if match == "hungarian" and num_clusters != num_classes:
            raise ConfigError(
                f"SemanticSegmentation: {num_clusters} clusters and {num_classes} classes cannot be matched one to "
                "one: use match=majority"
            )
        self.num_clusters, self.num_classes, self.ignore, self.match = num_clusters, num_classes, ignore, match
        self.keys = (prediction, regions, target)
        self.init, self.restarts, self.seeds = init, restarts, range(seed, seed + seeds)
        self.check_size = check_size
        self._ids: list[str] = []
        self._regions: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._nans = NanCount()

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Takes one batch.

        Raises:
            MetricError: a key is missing, or shapes do not fit.
        """
        for predicted in batches(data_samples):
            segments, regions, target = (read(key, predicted, data_batch) for key in self.keys)
            segments = as_segments(segments)
            segments = segments[:, 0] if segments.ndim == 4 else segments
            if regions.ndim != 3 or len(regions) != len(segments):
                raise MetricError(f"'{self.keys[1]}' is {tuple(regions.shape)}: region vectors (B, K, C) are expected")
            valid = target != self.ignore
            try:
                counts = contingency(target, segments, self.num_classes, regions.shape[1], valid).transpose(1, 2)
            except ValueError as error:
                raise MetricError(
                    f"semantic segmentation: of '{self.keys[0]}' and '{self.keys[2]}': {error}"
                ) from error
            self._nans.add(regions)
            self._ids += [str(i) for i in read("sample_id", predicted, data_batch)]
            self._regions.append(regions.detach().float())
            self._counts.append(counts)

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        """The figures over all processes; everything is reset. Collective.

        Args:
            size: samples in the data set; None: unknown.

        Raises:
            MetricError: nothing was evaluated, samples were counted twice, region vectors hold NaN, or there are fewer
                of them than clusters.
        """
        device = self._regions[0].device if self._regions else torch.device("cpu")
        own = (self._ids, *([part.cpu() for part in parts] for parts in (self._regions, self._counts)))
        parts = gather((*own, self._nans.take()))
        self._ids, self._regions, self._counts = [], [], []
        ids = [i for part in parts for i in part[0]]
        check_counts("semantic segmentation", len(ids), sum(part[3] for part in parts), size, self.check_size)
        # In the order of the ids: k-means starts at the same vectors whichever process evaluated which picture.
        order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
        regions, counts = (torch.cat([t for part in parts for t in part[place]])[order].to(device) for place in (1, 2))
        if regions.shape[0] * regions.shape[1] < self.num_clusters:
            raise MetricError(
                f"{len(ids)} pictures of {regions.shape[1]} slots do not make {self.num_clusters} clusters"
            )
        runs = [self._run(regions, counts, seed) for seed in self.seeds]
        figures: dict[str, float] = {}
        for name in runs[0]:
            values = [run[name] for run in runs]
            figures[name] = statistics.fmean(values)
            if len(values) > 1:
                figures[f"{name}_std"] = statistics.stdev(values)
        return self.prefixed(figures)

    def _run(self, regions: Tensor, counts: Tensor, seed: int) -> dict[str, float]:
        labels, _ = spherical_kmeans(regions.flatten(0, 1), self.num_clusters, seed, self.init, self.restarts)
        table = cluster_table(labels.view(counts.shape[:2]), counts, self.num_clusters)
        rules = {"miou": self.match, "miou_majority": "majority"}
        if self.num_clusters == self.num_classes:
            rules["miou_hungarian"] = "hungarian"
        return {name: float(class_iou(table, match_clusters(table, rule)).mean()) for name, rule in rules.items()}
