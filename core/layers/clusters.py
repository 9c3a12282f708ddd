"""K-means in torch, on the device of the vectors: with Euclidean distances, and with cosines."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

KMeansStart = Literal["kmeans++", "random"]


def kmeans(features: Tensor, size: int, iterations: int) -> Tensor:
    """Centres `(size, C)` of features `(N, C)`; begins at features drawn at random, and empty clusters stay there."""
    count = len(features)
    start = torch.randperm(count, device=features.device) if count >= size else None
    if start is None:
        start = torch.randint(count, (size,), device=features.device)
    centres = features[start[:size]].clone()
    for _ in range(iterations):
        chosen = torch.cdist(features, centres).argmin(dim=1)
        counts = torch.zeros_like(centres[:, 0]).index_add_(0, chosen, torch.ones_like(features[:, 0]))
        sums = torch.zeros_like(centres).index_add_(0, chosen, features)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return centres


def spherical_kmeans(
    vectors: Tensor,
    clusters: int,
    seed: int = 0,
    init: KMeansStart = "kmeans++",
    restarts: int = 10,
    iterations: int = 300,
) -> tuple[Tensor, Tensor]:
    """Clusters by cosine: of several runs the one with the largest mean cosine to the centres.

    Args:
        vectors: `(n, C)`; their length does not matter.
        clusters: `P`, at most n.
        seed: of the starts.
        init: centres far from each other (`kmeans++`, by 1 - cosine), or `random` vectors of the data.
        restarts: number of runs.
        iterations: of a run, at most; it ends when no vector changes its cluster.

    Returns:
        Cluster of every vector `(n,)` int64, and centres of unit length `(P, C)`.

    Raises:
        ValueError: fewer vectors than clusters, or an unknown start.
    """
    if init not in ("kmeans++", "random"):
        raise ValueError(f"spherical_kmeans: init={init!r}; use kmeans++ or random")
    if not 1 <= clusters <= len(vectors):
        raise ValueError(f"{len(vectors)} vectors do not make {clusters} clusters")
    unit = F.normalize(vectors.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(restarts):
        if init == "random":
            centres = unit[torch.randperm(len(unit), generator=generator)[:clusters].to(unit.device)]
        else:
            centres = _spread_centres(unit, clusters, generator)
        labels, centres, score = _lloyd(unit, centres, iterations)
        if best is None or score > best[0]:
            best = score, labels, centres
    return best[1], best[2]


def _spread_centres(unit: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres drawn one after the other, each vector as likely as it is far from those there are."""
    first = int(torch.randint(len(unit), (), generator=generator))
    chosen = [first]
    far = 1 - unit @ unit[first]
    for _ in range(clusters - 1):
        # Drawn on the CPU, so that all devices draw alike; where all vectors coincide any will do.
        weight = far.clamp(min=0).double().cpu()
        weight = weight if float(weight.sum()) > 0 else torch.ones_like(weight)
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        far = torch.minimum(far, 1 - unit @ unit[chosen[-1]])
    return unit[chosen]


def _lloyd(unit: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    labels = None
    for _ in range(iterations):
        cosine, nearest = (unit @ centres.T).max(dim=1)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels = nearest
        centres = torch.zeros_like(centres).index_add_(0, labels, unit)
        empty = (labels.bincount(minlength=len(centres)) == 0).nonzero().flatten()
        if len(empty):  # a cluster that lost all its vectors takes those which suit their centres least
            centres[empty] = unit[cosine.argsort()[: len(empty)]]
        centres = F.normalize(centres, dim=1)
    cosine, labels = (unit @ centres.T).max(dim=1)
    return labels, centres, float(cosine.mean())
