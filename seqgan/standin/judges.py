"""Networks that the stand-in is trained with and judged by, and a judge that is no network.

Both networks are trained once for a data set, and kept in `ROOT/SEED/`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.checkpoint import load, save_atomic
from core.data import derive_seed, preserved_random_state
from core.metrics.frechet import frechet_distance, gaussian
from core.output.progress import Progress
from seqgan.losses.perceptual import SemanticPerceptualLoss, TappedNetwork
from seqgan.standin.networks import LOSS_TAPS, LOW, SEMANTIC, JudgeNetwork, LossNetwork
from seqgan.standin.shape_glyphs import ShapeGlyphs

ROOT = "data/shape_glyphs"
# What is trained how long, and its stream of random numbers.
_RECIPES: dict[str, tuple[type[nn.Module], int, int]] = {
    "loss": (LossNetwork, 1200, 2),
    "judge": (JudgeNetwork, 1500, 3),
}
_VERSION = 1  # of the recipe below: kept networks of another one are trained anew


def augmented(image: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` in [-1, 1] with other colours, blurred and with noise; nothing that moves the shape."""
    count, device = len(image), image.device

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, device=device)

    grey = image.mean(dim=1, keepdim=True)
    image = grey + between(0, 1) * (image - grey)
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = mean + between(0.5, 1.2) * (image - mean) + between(-0.2, 0.2)
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.where(between(0, 1) < 0.5, blurred, image)
    noise = between(0, 0.3) * torch.randn_like(image)
    return torch.where(between(0, 1) < 0.5, image + noise, image)


def train_network(network: nn.Module, data: ShapeGlyphs, steps: int, title: str) -> nn.Module:
    """Trains a network to tell class and place: cross-entropy and squared error; AdamW 2e-3, one cycle, batches of 64.

    Three of four steps see augmented images.
    """
    drawn = data.drawn
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    network.train()
    for step in Progress().over(range(steps), title):
        rows = torch.randint(len(data), (64,))
        image = drawn.image[rows]
        out = network(image if step % 4 == 0 else augmented(image))
        loss = F.cross_entropy(out[:, :10], drawn.label[rows]) + F.mse_loss(out[:, 10:], drawn.place[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return network.eval().requires_grad_(False)


def trained_network(kind: str, data: ShapeGlyphs, root: str | os.PathLike[str] = ROOT) -> nn.Module:
    """The loss network or the judge of a data set, from its file or trained now (half a minute).

    Random numbers of the caller are left alone.

    Args:
        kind: `loss` or `judge`.
        data: training images.
        root: folder; files lie in one of it by seed.
    """
    model, steps, stream = _RECIPES[kind]
    settings = {
        "version": _VERSION,
        "steps": steps,
        "data": type(data).__name__,
        "count": data.count,
        "seed": data.seed,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(root) / str(data.seed) / f"{kind}-{name}.pt"
    with preserved_random_state():
        torch.manual_seed(derive_seed(data.seed, stream) % 2**63)
        network = model()
        if path.is_file():
            network.load_state_dict(load(path)["model"])
            return network.eval().requires_grad_(False)
        with torch.enable_grad():  # an evaluation may be the first to need it
            train_network(network, data, steps, f"{kind} network of {settings['data']}, seed {data.seed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomic({"model": network.state_dict(), "settings": settings}, path)
    return network


@torch.no_grad()
def tap_variances(tapped: TappedNetwork, image: Tensor) -> dict[str, float]:
    """Mean square of every tap after removing its mean over images: what makes its errors relative ones."""
    return {name: float((value - value.mean(dim=0)).square().mean()) for name, value in tapped(image).items()}


def shape_perceptual(
    data: ShapeGlyphs,
    alpha: float = 1.0,
    low: tuple[str, ...] = LOW,
    semantic: tuple[str, ...] = SEMANTIC,
    root: str = ROOT,
) -> SemanticPerceptualLoss:
    """The perceptual loss on the stand-in's loss network; every tap's error is relative to its variance.

    Args:
        data: training images, which the network was trained with.
        alpha: see `SemanticPerceptualLoss`.
        low: taps of L_low among `relu1` to `relu5` and `output`.
        semantic: taps of L_sem.
        root: see `trained_network`.
    """
    on_meta = torch.empty(()).is_meta  # built to be looked at: nothing is trained or read
    network = LossNetwork() if on_meta else trained_network("loss", data, root)
    tapped = TappedNetwork(network, LOSS_TAPS, (0.5,) * 3, (0.5,) * 3)
    scales = None if on_meta else tap_variances(tapped, data.drawn.image[:500])
    return SemanticPerceptualLoss(tapped, alpha, tuple(low), tuple(semantic), scales=scales)


class TemplateJudge:
    """Tells the class by the largest normalised correlation of the grey image with a shape's mask.

    Args:
        masks: `(T, 24, 24)` float.
        labels: `(T,)`, of the masks.
        local: take the mean over 9 x 9 pixels off images and masks first.
    """

    def __init__(self, masks: Tensor, labels: Tensor, local: bool = False) -> None:
        self.local = local
        flat = self._prepared(masks.float()).flatten(1)
        self.templates = F.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)
        self.labels = labels

    def __call__(self, image: Tensor) -> Tensor:
        """Classes `(B,)` of images `(B, 3, 24, 24)`."""
        grey = self._prepared(image.mean(dim=1)).flatten(1)
        grey = grey - grey.mean(dim=1, keepdim=True)
        # An image's own length does not change which template correlates most.
        return self.labels[(grey @ self.templates.T).argmax(dim=1)]

    def _prepared(self, grey: Tensor) -> Tensor:
        if not self.local:
            return grey
        return grey - F.avg_pool2d(F.pad(grey[:, None], (4, 4, 4, 4), mode="replicate"), 9, 1)[:, 0]


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features `(N, C)` and `(M, C)`, in float64."""
    return float(frechet_distance(gaussian(a), gaussian(b)))


def pooled_pixels(image: Tensor) -> Tensor:
    """Means over 4 x 4 pixels, `(B, 108)`: what the distance that no network judges is measured on."""
    return F.avg_pool2d(image, 4).flatten(1)


def prepare_networks(data: ShapeGlyphs, root: str | os.PathLike[str] = ROOT) -> dict[str, Any]:
    """Trains or finds both networks, and says how often each is right on the test images."""
    test = type(data)("test", data.seed)
    right = {}
    for kind in _RECIPES:
        network = trained_network(kind, data, root)
        right[kind] = float((network(test.drawn.image)[:, :10].argmax(1) == test.drawn.label).float().mean())
    return right
