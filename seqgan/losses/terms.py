"""Losses as functions of tensors: adversarial ones, and those of both transformers.

Perceptual losses have networks of their own: `seqgan.losses.perceptual`. Entropy terms need distances to the codes:
`seqgan.models.entropy`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ADVERSARIAL = ("hinge", "logistic")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge", factor: float = 0.5) -> Tensor:
    """What a discriminator minimises, given its logits of real and of reconstructed images.

    Args:
        real: logits, any shape.
        fake: logits, any shape.
        kind: `hinge`, or `logistic` (VQGAN calls it vanilla, MaskGIT non-saturating).
        factor: of the sum of both means; VQGAN has 0.5, MaskGIT 1.

    Raises:
        ValueError: an unknown kind.
    """
    _check(kind)
    if kind == "hinge":
        return factor * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return factor * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the decoder minimises, given the discriminator's logits of its images.

    Raises:
        ValueError: an unknown kind.
    """
    _check(kind)
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def _check(kind: str) -> None:
    if kind not in ADVERSARIAL:
        raise ValueError(f"unknown adversarial loss {kind!r}: use {', '.join(ADVERSARIAL)}")


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, weight: float = 0.8, limit: float = 1e4
) -> Tensor:
    """Weight of the adversarial loss that makes its gradient as long as the reconstruction's (VQGAN, equation 7).

    Under several processes it is that of the joint batch, the same on all of them.

    Args:
        reconstruction: L1 and perceptual loss; its graph is kept.
        adversarial: the generator's loss; its graph is kept.
        last_layer: weight of the decoder at which gradients are compared.
        weight: multiplies the ratio.
        limit: largest ratio.

    Returns:
        A scalar without gradient, in float32.
    """
    (towards,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (against,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    if dist.is_available() and dist.is_initialized():
        # Lengths of the gradients of the joint batch: a mean of ratios would be another weight.
        for part in (towards, against):
            dist.all_reduce(part)
            part.div_(dist.get_world_size())
    ratio = towards.float().norm() / (against.float().norm() + 1e-4)
    return weight * ratio.clamp(0.0, limit).detach()


def started(step: int, start: int, factor: float = 1.0, ramp: int = 0) -> float:
    """Factor of the adversarial loss: zero before step `start`, then `factor`, reached over `ramp` steps."""
    if step < start:
        return 0.0
    return factor * min(1.0, (step - start + 1) / (ramp + 1))


def gradient_penalty(discriminator: nn.Module, image: Tensor) -> Tensor:
    """R1: squared length of the gradient of the logits at real images `(B, C, H, W)`, mean over the batch."""
    image = image.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(image).sum(), image, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()


def autoregressive_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of codes `(B, N)` under logits `(B, N, K)`, mean over all positions."""
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())


def masked_loss(logits: Tensor, codes: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy of the masked codes, with smoothed labels (MaskGIT).

    Args:
        logits: `(B, N, K)`.
        codes: `(B, N)`.
        mask: `(B, N)`, True where a code was hidden.
        smoothing: probability that is spread evenly over all codes.

    Returns:
        The mean over images of each image's mean over its masked positions.
    """
    loss = F.cross_entropy(logits.movedim(-1, 1).float(), codes, reduction="none", label_smoothing=smoothing)
    weights = mask.to(loss.dtype)
    return ((loss * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)).mean()
