"""Losses of seqgan as the golden cases name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG

from seqgan.losses.perceptual import LPIPS, SemanticPerceptualLoss, TappedNetwork
from seqgan.losses.terms import adaptive_weight, discriminator_loss, generator_loss, masked_loss, started
from seqgan.models import MaskGITEntropy

from ..cases import Case
from . import Outputs


def _gan_losses(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    weight = case.state_dict()["last.weight"].requires_grad_()
    image = F.conv2d(inputs["hidden"], weight)
    nll = config["nll_factor"] * (image - inputs["target"]).abs().mean()
    logits = image.tanh() * inputs["critic"][:, None, None]
    adversarial = generator_loss(logits)
    return {
        "hinge": discriminator_loss(inputs["real"], inputs["fake"], "hinge"),
        "vanilla": discriminator_loss(inputs["real"], inputs["fake"], "logistic"),
        "nll": nll,
        "g_loss": adversarial,
        "d_weight": adaptive_weight(nll, adversarial, weight, config["disc_weight"]),
        "factor_at_step": torch.tensor(started(config["step"], config["disc_start"])),
    }


def _maskgit_losses(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    real, fake = inputs["real"], inputs["fake"]
    outputs = {
        "mvtm_loss": masked_loss(inputs["logits"], inputs["labels"], inputs["weights"], config["label_smoothing"]),
        "d_hinge": discriminator_loss(real, fake, "hinge", factor=1.0),
        "d_nonsat": discriminator_loss(real, fake, "logistic", factor=1.0),
        "g_nonsat": generator_loss(fake, "logistic"),
    }
    for assignment in ("softmax", "argmax"):
        term = MaskGITEntropy(1.0, config["entropy_temperature"], assignment)
        outputs[f"entropy_{assignment}"] = term(-inputs["logits"])
    return outputs


def _vgg(widths: list[int], hidden: int, logits: int) -> VGG:
    """torchvision's VGG16 with other widths."""
    layers: list[nn.Module] = []
    before = 3
    for width, count in zip(widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    network = VGG(nn.Sequential(*layers), init_weights=False)
    network.classifier = nn.Sequential(
        nn.Linear(before * 49, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()
    )
    network.classifier.append(nn.Linear(hidden, logits))
    return network


def _semantic_perceptual(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    state = case.state_dict()
    if "sqrt(2)" in case.meta["rule"]:
        state = {name: value * 2**0.5 if value.ndim > 1 else value for name, value in state.items()}
    network = _vgg(config["widths"], config["fc"], config["num_logits"])
    network.load_state_dict(state)
    taps = {name: f"features.{index}" for name, index in config["taps"].items()} | {"logit": "classifier.6"}
    tapped = TappedNetwork(network, taps)
    outputs: Outputs = {}
    for alpha in config["alphas"]:
        reconstruction = inputs["reconstruction"].clone().requires_grad_()
        loss = SemanticPerceptualLoss(tapped, alpha, tuple(config["taps"]))
        value, terms = loss(_centred(reconstruction, config), _centred(inputs["image"], config))
        (outputs[f"grad_alpha_{alpha}"],) = torch.autograd.grad(value, reconstruction)
        outputs[f"loss_alpha_{alpha}"] = value
        outputs |= {name if name in ("low", "semantic") else f"layer_{name}": term for name, term in terms.items()}
    return outputs


def _centred(image: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Images of the case's range in [-1, 1]."""
    low, high = config.get("input_range", (-1, 1))
    return image if (low, high) == (-1, 1) else (image - low) / (high - low) * 2 - 1


def _lpips(case: Case) -> Outputs:
    inputs, state = case.inputs(), case.state_dict()
    module = LPIPS()
    network = {name.split(".", 2)[2]: v for name, v in state.items() if name.startswith("net.")}
    module.network.network.load_state_dict(network)
    for i, own in enumerate(module.linear):
        own.data.copy_(state[f"lin{i}.model.1.weight"].abs().flatten())
    a = inputs["a"].requires_grad_()
    distance = module(a, inputs["b"])
    (gradient,) = torch.autograd.grad(distance.sum(), a)
    return {"distance": distance, "grad_a": gradient}


PIECES = {
    "gan_losses": _gan_losses,
    "maskgit_losses": _maskgit_losses,
    "semantic_perceptual": _semantic_perceptual,
    "lpips": _lpips,
}
