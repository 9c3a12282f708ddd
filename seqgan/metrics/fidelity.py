"""Inception features for FID (`core.metrics.frechet`), Inception score, precision and recall.

The network is the Inception of the original FID, converted to PyTorch by torch-fidelity; its file is
`weights-inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from core.checkpoint.weights import model_state
from core.errors import ConfigError
from core.layers.precision import no_autocast
from core.metrics.frechet import frechet_distance as frechet_distance

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
