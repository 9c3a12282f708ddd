"""Distances between sets of images: FID, Inception score, precision and recall, on torch-fidelity's network.

The network is the Inception of the original FID, converted to PyTorch by torch-fidelity; its file is
`weights-inception-2015-12-05-6726825d.pth`. Statistics are summed in float64, so that batches and processes add up.
"""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from core.checkpoint.weights import model_state
from core.config.files import reading
from core.errors import ConfigError
from core.layers.precision import no_autocast

LAYERS = (64, 192, 768, 2048)
_RELEASE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"


class Inception(nn.Module):
    """Features and logits of uint8 images of any size, which are resized as TensorFlow does it.

    Args:
        weights: file in torch-fidelity's layout.
        layer: width of the features: 2048 is FID's; narrower ones come from earlier layers.
        logits: give logits as well.
        key: what the file is called in errors, the argument of whoever asks for it.

    Raises:
        ConfigError: no such file, another layer, or a file of another network.
    """

    def __init__(
        self, weights: str | PathLike[str], layer: int = 2048, *, logits: bool = True, key: str = "weights"
    ) -> None:
        super().__init__()
        if layer not in LAYERS:
            raise ConfigError(f"layer={layer}: Inception has features of {', '.join(map(str, LAYERS))} channels")
        if not Path(weights).is_file():
            raise ConfigError(
                f"{key}={weights}: no such file. Give torch-fidelity's Inception "
                f"(weights-inception-2015-12-05-6726825d.pth of {_RELEASE}), or null to leave its figures out"
            )
        state = model_state(weights)
        wanted = [str(layer), "logits_unbiased"] if logits else [str(layer)]
        # The library reads its file itself, and without protection: it gets tensors that have been read safely.
        with tempfile.TemporaryDirectory() as folder:
            safe = Path(folder) / "inception.pth"
            torch.save(state, safe)
            try:
                self.network = FeatureExtractorInceptionV3("inception-v3-compat", wanted, str(safe))
            except RuntimeError as error:
                message = str(error).splitlines()[0]
                raise ConfigError(f"{key}={weights} does not hold torch-fidelity's Inception: {message}") from None
        self.width = layer

    def train(self, mode: bool = True) -> Inception:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features `(B, layer)` and, where they are wanted, logits without bias `(B, 1008)` of uint8 `(B, 3, H, W)`."""
        with no_autocast(images):
            found = self.network(images)
        return found[0], found[1] if len(found) > 1 else None


class Statistics(NamedTuple):
    """Mean `(D,)` and covariance `(D, D)` of features, float64."""

    mean: Tensor
    covariance: Tensor


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


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and deviation over `splits` parts of the images, of logits `(N, 1008)`; shuffled as torch-fidelity does it.

    Raises:
        ConfigError: fewer images than parts.
    """
    if len(logits) < splits:
        raise ConfigError(f"{len(logits)} images for {splits} parts of the Inception score: lower splits")
    found = isc_features_to_metric(logits.cpu(), splits)
    return found["inception_score_mean"], found["inception_score_std"]


def precision_recall(made: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019) of features `(N, D)` and `(M, D)`.

    Raises:
        ConfigError: not more images than neighbours.
    """
    if min(len(made), len(real)) <= neighbours:
        raise ConfigError(f"{len(made)} and {len(real)} images: precision and recall need more than {neighbours}")
    return calculate_precision_recall_part(made, real, neighbours)


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
