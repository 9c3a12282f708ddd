"""Null-text inversion (Mokady et al. 2023): empty texts, one a step, under which guidance leads to the source."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_a_video.inference.inversion import check_steps
from tune_a_video.interop.pipeline import TuneAVideoPipeline


def null_text_inversion(
    pipe: TuneAVideoPipeline,
    trajectory: Tensor,
    prompt: str,
    guidance_scale: float,
    *,
    iterations: int = 10,
    learning_rate: float = 1e-2,
    tolerance: float = 1e-5,
    window: int | None = None,
    overlap: int = 0,
) -> Tensor:
    """States that take the place of the empty text, for `negative_prompt_embeds` of the pipeline.

    Every step begins where the one before has led, and its text is moved by Adam until DDIM with guidance leads to the
    inversion's next latents.

    Args:
        pipe: the model that samples, with a scheduler of DDIM.
        trajectory: `(steps + 1, b, c, f, h, w)` of `pipe.invert(..., prompt, trajectory=True)`, the clean ones first.
        prompt: under which the source was inverted.
        guidance_scale: of the sampling to come.
        iterations: updates of each step's text; 0 gives the plain empty text.
        learning_rate: at the first step; it falls by a hundredth of itself with every step.
        tolerance: mean squared error at which a step is done.
        window, overlap: see the pipeline.

    Returns:
        `(steps, b, L, d)` in the network's precision.

    Raises:
        ValueError: a trajectory of another shape, or a scheduler that is not DDIM's.
    """
    if trajectory.ndim != 6 or len(trajectory) < 2:
        raise ValueError(f"trajectory is {tuple(trajectory.shape)}: (steps + 1, b, c, f, h, w) is expected")
    if type(pipe.scheduler).__name__ != "DDIMScheduler":
        raise ValueError(f"null-text inversion samples by DDIM, not by {type(pipe.scheduler).__name__}")
    steps, videos = len(trajectory) - 1, trajectory.shape[1]
    text = pipe.encode_prompt(prompt).expand(videos, -1, -1)
    empty = pipe.encode_prompt("").expand(videos, -1, -1)
    pipe.scheduler.set_timesteps(steps, device=trajectory.device)
    check_steps(pipe.scheduler, steps, pipe.scheduler.timesteps)
    latents, found = trajectory[-1].float(), []

    def moved(start: Tensor, t: Tensor, without: Tensor, with_text: Tensor) -> Tensor:
        output = without + guidance_scale * (with_text - without)
        return pipe.scheduler.step(output, t, start).prev_sample

    for i, t in enumerate(pipe.scheduler.timesteps):
        goal = trajectory[-i - 2].float()
        with torch.no_grad():
            with_text = pipe._predict(latents, t, text, window, overlap).float()
        state = empty.detach().float().clone().requires_grad_()
        optimizer = torch.optim.Adam([state], lr=learning_rate * max(1 - i / 100, 0.01))
        for _ in range(iterations):
            with torch.enable_grad():
                without = pipe._predict(latents, t, state.to(text.dtype), window, overlap).float()
                loss = F.mse_loss(moved(latents, t, without, with_text), goal)
            if loss.item() < tolerance:
                break
            # Of the text alone: the network may be one that is being tuned.
            state.grad = torch.autograd.grad(loss, state)[0]
            optimizer.step()
        empty = state.detach().to(text.dtype)
        found.append(empty)
        with torch.no_grad():
            latents = moved(latents, t, pipe._predict(latents, t, empty, window, overlap).float(), with_text)
    return torch.stack(found)
