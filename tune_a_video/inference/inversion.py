"""DDIM forwards and backwards in time (Song et al. 2021; paper, section 4.2: structure from inverted latents)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

# Noise levels have no meaning for a sampler that starts from noise of its own.
PREDICTIONS = ("epsilon", "v_prediction", "sample")

Predict = Callable[[Tensor, Tensor], Tensor]


def split_prediction(prediction: Tensor, noisy: Tensor, alpha: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a network's output says.

    Args:
        prediction: the output, shaped as `noisy`.
        noisy: `sqrt(alpha) x0 + sqrt(1 - alpha) eps`.
        alpha: cumulative product of the step, a scalar.
        kind: `epsilon`, `v_prediction` or `sample`.

    Raises:
        ValueError: an unknown kind.
    """
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "epsilon":
        return (noisy - noise * prediction) / signal, prediction
    if kind == "v_prediction":
        return signal * noisy - noise * prediction, signal * prediction + noise * noisy
    if kind == "sample":
        return prediction, (noisy - signal * prediction) / noise
    raise ValueError(f"no prediction_type {kind!r}: use {', '.join(PREDICTIONS)}")


def ddim_invert(
    predict: Predict,
    scheduler: Any,
    latents: Tensor,
    steps: int,
    *,
    iterations: int = 0,
    trajectory: bool = False,
) -> Tensor:
    """The latents from which deterministic DDIM sampling leads back to the given ones.

    A step from noise level p to the next t takes the prediction at t from the latents of level p (nothing better is
    known); `iterations` repeat the step with the prediction from its own result, which is what sampling will do.

    Args:
        predict: the network: noisy latents and the timestep (a scalar int64 tensor) to its output.
        scheduler: a `DDIMScheduler`, or another of diffusers with `alphas_cumprod` and the same configuration.
        latents: clean, any shape.
        steps: as many as sampling will take.
        iterations: fixed-point iterations per step.
        trajectory: return all levels.

    Returns:
        Latents at the sampler's first timestep; with `trajectory` `(steps + 1, *latents.shape)`, the given ones first.

    Raises:
        ValueError: the configuration is no DDIM, fewer than one step, or more than there are noise levels.
    """
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no noise levels to invert: use diffusers' DDIMScheduler")
    if steps < 1 or iterations < 0:
        raise ValueError(f"steps={steps}, iterations={iterations}: at least one step, no negative iterations")
    kind = config.get("prediction_type", "epsilon")
    alphas = scheduler.alphas_cumprod.to(device=latents.device, dtype=torch.float32)
    # The level before the first: DDIM's own when the clean latents are not taken for level 1.
    first = alphas.new_tensor(1.0) if config.get("set_alpha_to_one", False) else alphas[0]
    total = config["num_train_timesteps"]
    timesteps = sampling_timesteps(scheduler, steps)
    check_steps(scheduler, steps, timesteps)
    path = [latents]
    x = latents
    for t in reversed(timesteps):
        before = t - total // steps
        alpha, previous = alphas[t], alphas[before] if before >= 0 else first
        step = torch.tensor(t, device=latents.device)
        following = x
        for _ in range(iterations + 1):
            output = predict(following, step).float()
            # The first pass reads level p's latents with level p's noise; iterations read level t's with t's.
            clean, noise = split_prediction(output, x.float(), previous, kind)
            if following is not x:
                _, noise = split_prediction(output, following.float(), alpha, kind)
                clean = (x.float() - (1 - previous).sqrt() * noise) / previous.sqrt()
            following = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(latents.dtype)
        x = following
        if trajectory:
            path.append(x)
    return torch.stack(path) if trajectory else x


def sampling_timesteps(scheduler: Any, steps: int) -> list[int]:
    """The timesteps of `steps` steps of DDIM, descending, whatever the scheduler; that is left as it is.

    Samplers of higher order name timesteps twice, which a path from level to level cannot.
    """
    copy = DDIMScheduler.from_config(scheduler.config)
    copy.set_timesteps(steps)
    return [int(t) for t in copy.timesteps]


def check_steps(scheduler: Any, steps: int, timesteps: Any) -> None:
    """Timesteps lie within the noise levels: with an offset of 1, as Stable Diffusion has it, not all levels are steps.

    Args:
        scheduler: of diffusers.
        steps: as many as were asked for.
        timesteps: what the scheduler makes of them.

    Raises:
        ValueError: one lies behind the last level.
    """
    levels, offset = scheduler.config.get("num_train_timesteps"), scheduler.config.get("steps_offset", 0)
    if levels is not None and len(timesteps) and max(timesteps) >= levels:
        raise ValueError(
            f"{steps} steps lead to timestep {int(max(timesteps))}, and the scheduler has levels 0 to {levels - 1} "
            f"(steps_offset={offset}): use at most {levels - offset} steps"
        )
