"""Fréchet distance of Gaussians fitted to two sets of features: FID, FVD and the like, of any network.

Statistics are summed in float64, so that those of batches and processes add up.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.config.files import reading
from core.errors import ConfigError


class Statistics(NamedTuple):
    """Mean `(D,)` and covariance `(D, D)` of features, float64."""

    mean: Tensor
    covariance: Tensor


def gaussian(features: Tensor) -> Statistics:
    """Mean and covariance of features `(N, D)`."""
    features = features.double()
    return Statistics(features.mean(dim=0), torch.cov(features.T))


def statistics(count: Tensor, total: Tensor, outer: Tensor) -> Statistics:
    """From the number of features, their sum `(D,)` and the sum of their outer products `(D, D)`, all float64.

    Raises:
        ConfigError: fewer than two images.
    """
    if count < 2:
        raise ConfigError(f"{int(count)} image(s): a Frechet distance needs two at least, and thousands to mean much")
    mean = total / count
    return Statistics(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> Tensor:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))` (Heusel et al. 2017), float64.

    With C = R R^T, the last trace is the sum of the singular values of `R_a^T R_b`: no root of a matrix that is not
    symmetric is taken, and singular covariances of few images do no harm.

    Raises:
        ConfigError: statistics of different features.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"statistics of {len(a.mean)} and of {len(b.mean)} features: take both from one layer")
    roots = []
    for part in (a, b):
        values, vectors = torch.linalg.eigh(part.covariance)
        roots.append(vectors * values.clamp_min(0).sqrt())
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross


def read_statistics(file: str | PathLike[str]) -> Statistics | None:
    """Statistics `mu` and `sigma` of an NPZ file, e.g. one of ADM's reference batches; None: it has none."""
    with reading(file, "It should hold arrays mu and sigma: make or copy it again."):
        with np.load(file, allow_pickle=False) as arrays:
            if "mu" not in arrays or "sigma" not in arrays:
                return None
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(f"mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}")
    return Statistics(mean, covariance)


def write_statistics(file: str | PathLike[str], found: Statistics, **arrays: Any) -> None:
    """An NPZ file that `read_statistics` reads."""
    np.savez(file, mu=found.mean.cpu().numpy(), sigma=found.covariance.cpu().numpy(), **arrays)
