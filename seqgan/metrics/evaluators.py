"""Evaluators: of tokenizers, of samples, of how predictable and how separable codes are.

.. code-block:: yaml

    val_evaluator: {type: seqgan.TokenizerQuality, codebook_size: 1024, weights: /path/to/inception.pth}

Metrics (torchmetrics) take tensors; evaluators (mmengine) read what a trainer's `predict` returns, and count every
sample once however many processes there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from core.config.registry import METRICS
from core.errors import ConfigError
from core.metrics import TorchMetrics
from core.metrics.frechet import Statistics, frechet_distance, read_statistics, statistics
from seqgan.losses.perceptual import LPIPS, SemanticPerceptualLoss
from seqgan.metrics.diagnostics import code_histogram, codebook_usage
from seqgan.metrics.fidelity import Inception, inception_score, precision_recall


# ---------------------------------------------------------------------- metrics of tensors
class ImageScores(Metric):
    """`fid`, and where they are wanted `inception_score` (with `_std`), `precision` and `recall`.

    Args:
        network: features and, for the Inception score, logits.
        reference: statistics of the real images; None: `update` gets real images.
        splits: of the Inception score; 0: leave it out.
        neighbours: of precision and recall; 0: leave them out.

    Raises:
        ConfigError: precision and recall against statistics alone, or statistics of another width.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        network: Inception,
        reference: Statistics | None = None,
        splits: int = 0,
        neighbours: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if reference is not None and neighbours:
            raise ConfigError("precision and recall compare images: statistics are no reference (neighbours=0)")
        if reference is not None and len(reference.mean) != network.width:
            raise ConfigError(f"the reference has {len(reference.mean)} features, the network's layer {network.width}")
        self.network, self.reference, self.splits, self.neighbours = network, reference, splits, neighbours
        for side in ("made", "real"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(network.width, dtype=torch.float64), dist_reduce_fx="sum")
            outer = torch.zeros(network.width, network.width, dtype=torch.float64)
            self.add_state(f"{side}_outer", outer, dist_reduce_fx="sum")
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, made: Tensor | None, real: Tensor | None = None) -> None:
        """Takes images, uint8 or in [-1, 1], `(B, 3, H, W)`; either may be None."""
        for side, images in (("made", made), ("real", real)):
            if images is None:
                continue
            features, logits = self.network(as_bytes(images))
            wide = features.double()
            setattr(self, f"{side}_count", getattr(self, f"{side}_count") + len(wide))
            setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + wide.sum(dim=0))
            setattr(self, f"{side}_outer", getattr(self, f"{side}_outer") + wide.T @ wide)
            if self.neighbours:
                getattr(self, f"{side}_features").append(features)
            if side == "made" and self.splits and logits is not None:
                self.logits.append(logits)

    def statistics(self, side: str) -> Statistics:
        """Of the images that were `made`, or are `real`, on the CPU."""
        parts = (getattr(self, f"{side}_{name}").cpu() for name in ("count", "sum", "outer"))
        return statistics(*parts)

    def compute(self) -> dict[str, Tensor]:
        """Figures by name."""
        real = self.statistics("real") if self.reference is None else self.reference
        found: dict[str, float | Tensor] = {"fid": frechet_distance(self.statistics("made"), real)}
        if self.splits:
            mean, deviation = inception_score(_joined(self.logits), self.splits)
            found |= {"inception_score": mean, "inception_score_std": deviation}
        if self.neighbours:
            pair = _joined(self.made_features), _joined(self.real_features)
            found["precision"], found["recall"] = precision_recall(*pair, self.neighbours)
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}


def as_bytes(images: Tensor) -> Tensor:
    """uint8 images as they are, others from [-1, 1]."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _joined(state: Tensor | Sequence[Tensor]) -> Tensor:
    return state if isinstance(state, Tensor) else torch.cat(list(state))


class CodebookUse(Metric):
    """`usage`, `perplexity`, `dead_codes` of the codebook, and `codes_per_image`, different ones in an image.

    Args:
        size: codes of the codebook.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(**options)
        self.size = size
        for state, value in (("counts", torch.zeros(size, dtype=torch.long)), ("images", torch.tensor(0))):
            self.add_state(state, value, dist_reduce_fx="sum")
        self.add_state("different", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Takes codes `(B, ...)`.

        Raises:
            ValueError: a code that the codebook does not have.
        """
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.size:
            raise ValueError(f"codes up to {int(indices.max())}, but codebook_size={self.size}")
        flat = indices.flatten(1)
        self.counts += code_histogram(flat, self.size)
        ordered = flat.sort(dim=1).values
        self.different += ((ordered[:, 1:] != ordered[:, :-1]).sum() + len(flat)).long()
        self.images += len(flat)

    def compute(self) -> dict[str, Tensor]:
        """Figures by name."""
        found = codebook_usage(self.counts)
        return {
            "usage": found.usage,
            "perplexity": found.perplexity,
            "dead_codes": (self.counts == 0).sum(),
            "codes_per_image": self.different / self.images,
        }


class CodeBits(Metric):
    """How predictable codes are: `bits_per_code`, `top1` and, with `pixels`, `bits_per_pixel`.

    Args:
        pixels: of an image; None: unknown.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, pixels: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.pixels = pixels
        for state in ("nats", "right", "count", "codes", "images"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, right: Tensor, mask: Tensor) -> None:
        """Takes nats, whether codes were predicted rightly, and which were asked for, `(B, N)` each."""
        self.nats += nll.double()[mask].sum()
        self.right += right[mask].sum()
        self.count += mask.sum()
        self.codes += mask.numel()
        self.images += len(mask)

    def compute(self) -> dict[str, Tensor]:
        """Figures by name."""
        bits = self.nats / self.count / math.log(2)
        found = {"bits_per_code": bits, "top1": self.right / self.count}
        if self.pixels is not None:
            found["bits_per_pixel"] = bits * self.codes / self.images / self.pixels
        return found


class LinearProbe(Metric):
    """Accuracy of a linear classifier of images from one vector each: half of the images train it, half test it.

    Which half an image belongs to depends on its name alone. Vectors are standardised; the classifier is logistic
    regression.

    Args:
        codes: size of the codebook: vectors are histograms of codes; None: they are means of maps of features.
        regularisation: inverse strength of the penalty, `C` of scikit-learn.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, codes: int | None = None, regularisation: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.codes, self.regularisation = codes, regularisation
        for state in ("vectors", "labels", "names"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, maps: Tensor, label: Tensor, sample_id: Sequence[str]) -> None:
        """Takes codes `(B, h, w)`, or features `(B, C, h, w)`, labels `(B,)` and names."""
        if self.codes is None:
            vectors = maps.float().flatten(2).mean(dim=2)
        else:
            vectors = torch.stack([code_histogram(one, self.codes) for one in maps]).float() / maps[0].numel()
        self.vectors.append(vectors)
        self.labels.append(label.long())
        digests = (hashlib.sha256(str(name).encode()).digest()[:7] for name in sample_id)
        self.names.append(torch.tensor([int.from_bytes(d, "big") for d in digests], device=vectors.device))

    def compute(self) -> Tensor:
        """Share of the tested half that is classified rightly.

        Raises:
            ConfigError: too few images, or one class only.
        """
        from sklearn.linear_model import LogisticRegression

        vectors, labels, names = (_joined(part).cpu() for part in (self.vectors, self.labels, self.names))
        order = names.argsort(stable=True)
        vectors, labels = vectors[order].double(), labels[order]
        half = len(labels) // 2
        if half < 2 or len(labels[:half].unique()) < 2:
            raise ConfigError("a linear probe needs images of two classes at least in the half that trains it")
        mean, deviation = vectors[:half].mean(dim=0), vectors[:half].std(dim=0)
        scaled = ((vectors - mean) / deviation.where(deviation > 0, 1.0)).numpy()
        probe = LogisticRegression(C=self.regularisation, max_iter=1000).fit(scaled[:half], labels[:half].numpy())
        return torch.tensor(probe.score(scaled[half:], labels[half:].numpy()), dtype=torch.float64)


class _MeanDistance(MeanMetric):
    """Mean of a network's distances of pairs of images."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def update(self, a: Tensor, b: Tensor) -> None:
        """Takes images `(B, 3, H, W)` in [-1, 1]."""
        with torch.no_grad():
            super().update(self.network(a, b).flatten())


class PerceptualTerms(Metric):
    """What the perceptual loss is made of: `term_TAP` of every tap, `term_low` and `term_semantic`, before weighting.

    Args:
        loss: of reconstructions and images.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, loss: SemanticPerceptualLoss, **options: Any) -> None:
        super().__init__(**options)
        self.loss = loss
        self.taps = (*dict.fromkeys((*loss.low, *loss.semantic)), "low", "semantic")
        self.add_state("sums", torch.zeros(len(self.taps), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, image: Tensor) -> None:
        """Takes images `(B, 3, H, W)` in [-1, 1]."""
        with torch.no_grad():
            _, terms = self.loss(reconstruction, image)
        self.sums += torch.stack([terms[name] for name in self.taps]).double() * len(image)
        self.images += len(image)

    def compute(self) -> dict[str, Tensor]:
        """Means over images, by name."""
        return {f"term_{name}": value / self.images for name, value in zip(self.taps, self.sums, strict=True)}


# ---------------------------------------------------------------------- evaluators
@METRICS.register_module()
class TokenizerQuality(TorchMetrics):
    """Of reconstructions: `psnr`, `ssim`, `l1`, with weights `rfid` and `lpips`; of codes: see `CodebookUse`.

    Args:
        codebook_size: codes of the codebook.
        weights: file of torch-fidelity's Inception; null: no rFID.
        layer: see `Inception`.
        lpips: arguments of `seqgan.LPIPS`, `{weights: vgg16.pth, linear: vgg.pth}`; null: no LPIPS.
        probe: also the accuracy of linear probes, `probe_codes` and `probe_features`, see `LinearProbe`; samples need
            a label.
        perceptual: a loss whose terms are wanted, too, see `PerceptualTerms`; null: none.
        prefix: in front of all names.

    Raises:
        ConfigError: a file that is not there.
    """

    def __init__(
        self,
        codebook_size: int = 1024,
        weights: str | PathLike[str] | None = None,
        layer: int = 2048,
        lpips: Mapping[str, Any] | None = None,
        probe: bool = False,
        perceptual: SemanticPerceptualLoss | None = None,
        prefix: str = "",
    ) -> None:
        metrics: dict[str, Metric] = {
            "psnr": PeakSignalNoiseRatio(data_range=2.0, dim=(1, 2, 3), reduction="elementwise_mean"),
            "ssim": StructuralSimilarityIndexMeasure(data_range=2.0),
            "l1": MeanAbsoluteError(),
            "codes": CodebookUse(codebook_size),
        }
        inputs = {"codes": ["indices"]}
        if weights is not None:
            metrics["images"] = ImageScores(Inception(weights, layer, logits=False))
        if lpips is not None:
            for name in ("weights", "linear"):
                if lpips.get(name) is None:
                    raise ConfigError(f"lpips.{name}: give its file, or lpips=null to leave LPIPS out")
            metrics["lpips"] = _MeanDistance(LPIPS(**lpips))
        if perceptual is not None:
            metrics["terms"] = PerceptualTerms(perceptual)
        if probe:
            metrics |= {"probe_codes": LinearProbe(codebook_size), "probe_features": LinearProbe()}
            inputs |= {
                f"probe_{name}": [key, "label", "sample_id"]
                for name, key in (("codes", "indices"), ("features", "features"))
            }
        names = {"images/fid": "rfid"}
        super().__init__(metrics, "reconstruction", "image", inputs, names=names, prefix=prefix)


@METRICS.register_module()
class CodePredictability(TorchMetrics):
    """`bits_per_code`, `top1` and `bits_per_pixel` of codes under a transformer, see `CodeBits`.

    Args:
        pixels: of an image, e.g. 65536; null: no bits per pixel.
        prefix: in front of all names.
    """

    def __init__(self, pixels: int | None = None, prefix: str = "") -> None:
        inputs = {"codes": ["nll", "right", "mask"]}
        super().__init__({"codes": CodeBits(pixels)}, inputs=inputs, names={}, prefix=prefix)


@METRICS.register_module()
class SampleQuality(TorchMetrics):
    """Of samples against images: `gfid`, `inception_score` with its deviation, `precision` and `recall`.

    Reads `sample` of a `TransformerTrainer` with `sample_evaluation=true`, one for each sample of the data set, and
    compares them with the images of the data set, or with statistics in a file. Bits and top-1 of codes stand beside.

    Args:
        weights: file of torch-fidelity's Inception; null: no figures of samples.
        reference: NPZ file with `mu` and `sigma`, e.g. an ADM reference batch; null: the data set's images.
        splits: of the Inception score; 0: none.
        neighbours: of precision and recall; 0: none, as it has to be with a reference.
        layer: see `Inception`.
        pixels: see `CodePredictability`.
        prefix: in front of all names.

    Raises:
        ConfigError: a reference without statistics.
    """

    def __init__(
        self,
        weights: str | PathLike[str] | None = None,
        reference: str | PathLike[str] | None = None,
        splits: int = 10,
        neighbours: int = 3,
        layer: int = 2048,
        pixels: int | None = None,
        prefix: str = "",
    ) -> None:
        metrics: dict[str, Metric] = {"codes": CodeBits(pixels)}
        inputs = {"codes": ["nll", "right", "mask"]}
        if weights is not None:
            found = None if reference is None else read_statistics(reference)
            if reference is not None and found is None:
                raise ConfigError(
                    f"reference={reference} has no mu and sigma: write them by python -m seqgan.metrics.evaluate"
                )
            network = Inception(weights, layer, logits=splits > 0)
            neighbours = 0 if reference is not None else neighbours
            metrics["images"] = ImageScores(network, found, splits, neighbours)
            inputs["images"] = ["sample"] if reference is not None else ["sample", "image"]
        super().__init__(metrics, inputs=inputs, names={"images/fid": "gfid"}, prefix=prefix)
