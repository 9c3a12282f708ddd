"""Evaluation metrics: a bridge to torchmetrics, and what it does not have."""

from __future__ import annotations

from core.metrics.bridge import TorchMetrics
from core.metrics.contingency import adjusted_rand, contingency
from core.metrics.frechet import Statistics, frechet_distance, gaussian
from core.metrics.grouped import GroupedAccuracy
from core.metrics.grouping import ARI, BestOverlap, ClusterMIoU, ForegroundIoU, GroupingScores, SegCover

__all__ = [
    "ARI",
    "BestOverlap",
    "ClusterMIoU",
    "ForegroundIoU",
    "GroupedAccuracy",
    "GroupingScores",
    "SegCover",
    "Statistics",
    "TorchMetrics",
    "adjusted_rand",
    "contingency",
    "frechet_distance",
    "gaussian",
]
