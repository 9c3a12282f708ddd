"""Perceptual losses: the semantic-enhanced one of the paper (equation 3), and LPIPS.

loss = SemanticPerceptualLoss(vgg16("vgg16-397923af.pth"), alpha=1.0)
value, per_layer = loss(reconstruction, image)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from core.checkpoint.weights import model_state
from core.layers.statistics import IMAGENET_MEAN, IMAGENET_STD

VGG16_TAPS = {
    "relu1_2": "features.3",
    "relu2_2": "features.8",
    "relu3_3": "features.15",
    "relu4_3": "features.22",
    "relu5_3": "features.29",
    "logit": "classifier.6",
}
LOW = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
SEMANTIC = ("relu5_3", "logit")


class TappedNetwork(nn.Module):
    """A frozen network whose activations are read at named places; always in eval mode.

    Args:
        network: a classifier of images.
        taps: name -> path of the module whose output is read; an empty path is the network's output.
        mean: of the images that it was trained with, per channel, for images in [0, 1].
        std: likewise.
        image_size: side to which images are resized (bilinear), for networks that take one size only; None: as given.

    Raises:
        ValueError: a path that the network does not have.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Mapping[str, str],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.network, self.taps, self.image_size = network, dict(taps), image_size
        modules = dict(network.named_modules())
        for name, path in self.taps.items():
            if path not in modules:
                near = [known for known in modules if known.split(".")[0] == path.split(".")[0]][:12]
                raise ValueError(f"tap {name!r}: {type(network).__name__} has no module {path!r}; there are {near}")
        for module in modules.values():
            if getattr(module, "inplace", False):
                module.inplace = False  # what has been read must not change afterwards
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TappedNetwork:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Activations by tap of images `(B, 3, H, W)` in [-1, 1]."""
        x = ((image + 1) / 2 - self.mean) / self.std
        if self.image_size is not None and x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        read: dict[str, Tensor] = {}

        def reader(name: str):
            return lambda module, inputs, output: read.__setitem__(name, output)

        hooks = [
            self.network.get_submodule(path).register_forward_hook(reader(name)) for name, path in self.taps.items()
        ]
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: read[name] for name in self.taps}


def vgg16(weights: str | PathLike[str] | None, taps: Mapping[str, str] | None = None) -> TappedNetwork:
    """torchvision's VGG16 with the paper's taps.

    Args:
        weights: its file (`VGG16_Weights.IMAGENET1K_V1`, vgg16-397923af.pth); None: random weights, for tests.
        taps: other taps.

    Raises:
        core.errors.ConfigError: no such file.
    """
    return classifier("torchvision", "vgg16", weights, VGG16_TAPS if taps is None else taps)


def classifier(
    library: str,
    name: str,
    weights: str | PathLike[str] | None,
    taps: Mapping[str, str],
    image_size: int | None = None,
    num_classes: int = 1000,
) -> TappedNetwork:
    """Any classifier of torchvision or timm as the semantic network.

    Args:
        library: `torchvision` or `timm`.
        name: as the library calls it, e.g. `resnet50`.
        weights: a file of its weights; None: random weights, for tests.
        taps: see `TappedNetwork`; its output is `{"logit": ""}`.
        image_size: see `TappedNetwork`.
        num_classes: of the file.

    Raises:
        core.errors.ConfigError: no such file.
        ValueError: an unknown library, or a tap that the network does not have.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if library == "torchvision":
        network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    elif library == "timm":
        network = timm.create_model(name, num_classes=num_classes)
        mean, std = network.pretrained_cfg.get("mean", mean), network.pretrained_cfg.get("std", std)
    else:
        raise ValueError(f"unknown library {library!r}: use torchvision or timm")
    if weights is not None and not any(value.is_meta for value in network.state_dict().values()):
        network.load_state_dict(model_state(weights))
    return TappedNetwork(network, taps, mean, std, image_size)


class SemanticPerceptualLoss(nn.Module):
    """`alpha * L_sem + (1 - alpha) * L_low`: squared differences of activations (equation 3).

    Every tap gives the mean over channels, positions and images; taps of a group are added up.

    Args:
        network: activations by tap, e.g. `vgg16(path)`.
        alpha: 1 in the first phase, 0 in the second.
        low: taps of L_low; empty with `low_loss`.
        semantic: taps of L_sem.
        low_loss: another loss of two images in place of L_low, e.g. `LPIPS`.
        scales: tap -> number that its term is divided by; others: 1.

    Raises:
        ValueError: taps that the network does not give, or alpha outside of [0, 1].
    """

    def __init__(
        self,
        network: TappedNetwork,
        alpha: float = 1.0,
        low: Sequence[str] = LOW,
        semantic: Sequence[str] = SEMANTIC,
        low_loss: nn.Module | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.low, self.semantic = tuple(low) if low_loss is None else (), tuple(semantic)
        self.scales = dict(scales or {})
        unknown = {*self.low, *self.semantic, *self.scales} - set(network.taps)
        if unknown:
            raise ValueError(f"no taps {sorted(unknown)}: the network gives {', '.join(network.taps)}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a share between 0 and 1, not {alpha}")
        self.network, self.alpha, self.low_loss = network, alpha, low_loss

    def forward(self, reconstruction: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of images `(B, 3, H, W)` in [-1, 1], and what each tap and group had, detached.

        Only the reconstruction gets a gradient.
        """
        terms = self.distances(reconstruction, image)
        groups = {"semantic": sum((terms[name] for name in self.semantic), reconstruction.new_zeros(()))}
        if self.low_loss is None:
            groups["low"] = sum((terms[name] for name in self.low), reconstruction.new_zeros(()))
        else:
            groups["low"] = self.low_loss(reconstruction, image.detach()).mean()
        value = self.alpha * groups["semantic"] + (1 - self.alpha) * groups["low"]
        return value, {name: term.detach() for name, term in {**terms, **groups}.items()}

    def distances(self, reconstruction: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Every tap's term."""
        with torch.no_grad():
            wanted = self.network(image)
        given = self.network(reconstruction)
        return {
            # Squared in float32, also where the network ran in half precision.
            name: F.mse_loss(given[name].float(), wanted[name].float()) / self.scales.get(name, 1.0)
            for name in given
            if name in {*self.low, *self.semantic}
        }


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 (Zhang et al. 2018), as VQGAN uses it.

    Args:
        weights: torchvision's VGG16 file; None: random weights, for tests.
        linear: the file with the learned weights of channels (`vgg.pth` of the LPIPS release, `lin{i}.model.1.weight`);
            None: random ones, for tests.

    Raises:
        core.errors.ConfigError: no such file.
        ValueError: the file lacks weights of a layer.
    """

    # The release's own constants for images in [-1, 1]; nearly ImageNet's mean and deviation.
    _SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self, weights: str | PathLike[str] | None = None, linear: str | PathLike[str] | None = None) -> None:
        super().__init__()
        features = vgg16(weights).network.features[:30]
        taps = {name: VGG16_TAPS[name].removeprefix("features.") for name in LOW}
        mean = [(1 + shift) / 2 for shift in self._SHIFT]
        self.network = TappedNetwork(features, taps, mean, [scale / 2 for scale in self._SCALE])
        self.linear = nn.ParameterList(torch.rand(width) for width in (64, 128, 256, 512, 512))
        if linear is not None and not self.linear[0].is_meta:
            state = model_state(linear)
            for i, own in enumerate(self.linear):
                name = f"lin{i}.model.1.weight"
                if name not in state or state[name].numel() != own.numel():
                    raise ValueError(f"{linear} has no {name} of {own.numel()} channels: give LPIPS' file for VGG16")
                own.data.copy_(state[name].flatten())
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances `(B, 1, 1, 1)` of images `(B, 3, H, W)` in [-1, 1]."""
        total = a.new_zeros(())
        for x, y, weight in zip(self.network(a).values(), self.network(b).values(), self.linear, strict=True):
            x, y = (value / (torch.linalg.vector_norm(value, dim=1, keepdim=True) + 1e-10) for value in (x, y))
            squared = torch.einsum("bchw,c->bhw", (x - y).square(), weight)
            total = total + squared.mean(dim=(1, 2))
        return total.view(-1, 1, 1, 1)
