"""The denoising loss of latent videos, and the noise it is taken with, as functions of tensors (paper, equation 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISES = ("iid", "mixed", "progressive", "shared")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def frame_noise(
    shape: tuple[int, ...],
    kind: str = "iid",
    offset: float = 0.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise `(b, c, f, h, w)`.

    Args:
        shape: of the noise.
        kind: `iid`: independent per frame, as in the paper; `shared`: one for all frames; `mixed` (a common part of
            weight 1) and `progressive` (each frame's from the one before, weight 2) as in PYoCo (Ge et al. 2023).
        offset: strength of noise that is constant over a frame's places.
        generator: of the draws; None: torch's global one.
        device: where it lies.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in NOISES:
        raise ValueError(f"no noise {kind!r}: use {', '.join(NOISES)}")

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    noise = draw(*shape)
    if kind == "shared":
        noise = noise[:, :, :1].expand(shape).clone()
    elif kind == "mixed":
        noise = (noise + draw(*shape[:2], 1, *shape[3:])) / math.sqrt(2)
    elif kind == "progressive":
        keep, fresh = 2 / math.sqrt(5), 1 / math.sqrt(5)
        frames = list(noise.unbind(2))
        for i in range(1, len(frames)):
            frames[i] = keep * frames[i - 1] + fresh * frames[i]
        noise = torch.stack(frames, dim=2)
    if offset:
        noise = noise + offset * draw(*shape[:3], 1, 1)
    return noise


def levels(alphas_cumprod: Tensor, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Weights of signal and noise at the timesteps `(b,)`, shaped to multiply `(b, ...)` of `ndim` axes; float32."""
    alpha = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps].view(-1, *[1] * (ndim - 1))
    return alpha.sqrt(), (1 - alpha).sqrt()


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """`sqrt(alpha_t) z + sqrt(1 - alpha_t) eps`.

    Args:
        latents, noise: `(b, c, f, h, w)`.
        timesteps: `(b,)` int64, one per video.
        alphas_cumprod: `(T,)`.
    """
    signal, strength = levels(alphas_cumprod, timesteps, latents.ndim)
    return signal * latents + strength * noise


def prediction_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, kind: str = "epsilon"
) -> Tensor:
    """What the network's output is compared with: the noise, or the velocity `sqrt(alpha) eps - sqrt(1 - alpha) z`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    if kind == "v_prediction":
        signal, strength = levels(alphas_cumprod, timesteps, latents.ndim)
        return signal * noise - strength * latents
    raise ValueError(f"no prediction_type {kind!r}: use {', '.join(PREDICTIONS)}")


def min_snr_weight(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float, kind: str = "epsilon") -> Tensor:
    """Weights `(b,)` that cap the signal-to-noise ratio at gamma (Hang et al. 2023).

    Raises:
        ValueError: gamma is not positive.
    """
    if gamma <= 0:
        raise ValueError(f"min_snr_gamma={gamma}: a positive number, or null for none")
    signal, strength = levels(alphas_cumprod, timesteps, 1)
    ratio = (signal / strength).square()
    capped = ratio.clamp(max=gamma)
    return capped / {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}[kind]


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error over every element, in float32.

    Args:
        prediction, target: `(b, ...)`.
        weight: `(b,)`, of a video's own mean.
    """
    error = (prediction.float() - target.float()).square()
    if weight is None:
        return error.mean()
    return (error.flatten(1).mean(dim=1) * weight).mean()
