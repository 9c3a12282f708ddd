"""Evaluation metrics: a bridge to torchmetrics, and what it does not have."""

from __future__ import annotations

from core.metrics.bridge import TorchMetrics
from core.metrics.grouped import GroupedAccuracy

__all__ = ["GroupedAccuracy", "TorchMetrics"]
