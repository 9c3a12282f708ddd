"""What needs no learning: each picture's features, clustered. Slots have to be held against it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError
from core.layers.clusters import spherical_kmeans
from core.trainer import Batch, Trainer
from slot_walks.losses.walks import segments


class PatchClusters(Trainer):
    """Segments of pictures by k-means with cosine distance on the patch features of each picture alone.

    It is evaluated as slots are and is not trained: an experiment leaves out `train_dataloader`.

    Args:
        backbone: gives features `(B, N, C)` of pictures, and has `grid(image)`.
        num_clusters: of each picture.
        restarts: runs of k-means, of which the one that fits best is taken.
        seed: of their starts.
    """

    def __init__(self, backbone: nn.Module, num_clusters: int = 5, restarts: int = 10, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.num_clusters, self.restarts, self.seed = num_clusters, restarts, seed

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Raises ConfigError: there is nothing to train."""
        raise ConfigError("clusters of patches are not trained: set train_dataloader=null")

    def predict(self, batch: Batch) -> dict[str, Any]:
        """`segments` `(B, H, W)` uint8, the cluster of every pixel; patches are enlarged as those of slots are."""
        image = batch["image"]
        features, grid = self.backbone(image), self.backbone.grid(image)
        clusters = torch.stack([self._cluster(each) for each in features])
        assignment = F.one_hot(clusters, self.num_clusters).to(features.dtype)
        size = batch["mask"].shape[-2:] if "mask" in batch else image.shape[-2:]
        kept = {key: value for key, value in batch.items() if key != "image"}
        return kept | {"segments": segments(assignment, grid, tuple(size))}

    def _cluster(self, features: Tensor) -> Tensor:
        found, _ = spherical_kmeans(features, self.num_clusters, self.seed, restarts=self.restarts)
        return found.to(features.device)
