"""From a source clip and prompts to edited clips: invert once, sample all prompts in batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_a_video.data.video_io import video_grid
from tune_a_video.inference.null_text import null_text_inversion
from tune_a_video.interop.folders import check_scheduler
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.losses import frame_noise

INITS = ("ddim_inversion", "noise", "shared_noise", "ddim_inversion:EVERY", "sdedit:STRENGTH")


@dataclass(frozen=True)
class Sampling:
    """How edits are sampled; the defaults are the released configurations'.

    init: where sampling starts: `ddim_inversion` of the source, `noise`, `shared_noise` (the same for all frames),
        `ddim_inversion:2` (every second frame inverted and noise for those between, whose content only the tuned
        network knows), or `sdedit:0.6` (the source noised so far).
    steps: of the inversion and of sampling.
    guidance_scale: of classifier-free guidance.
    eta: of DDIM.
    scheduler: name of a diffusers scheduler for sampling; None: DDIM, which inverted latents ask for.
    inversion_prompt: text under which the source is inverted; None: its caption.
    inversion_iters: fixed-point iterations of each step of the inversion.
    negative_prompt: in place of the empty text.
    null_text: iterations of null-text inversion in each step, which then takes the place of the negative prompt; the
        source has to be inverted, and under its caption (`inversion_prompt: null`). 0: none.
    seed: of every prompt's noise, so that an edit does not depend on its neighbours.
    prompts_at_once: in a batch; None: all.
    window, overlap: frames at a time, for clips that are longer than memory allows; None: all.
    cache: folder for inversions; None: they are not kept.

    Raises:
        ValueError: an unknown start or scheduler, or numbers that make no sense.
    """

    init: str = "ddim_inversion"
    steps: int = 50
    guidance_scale: float = 12.5
    eta: float = 0.0
    scheduler: str | None = None
    inversion_prompt: str | None = ""
    inversion_iters: int = 0
    negative_prompt: str = ""
    seed: int = 33
    prompts_at_once: int | None = None
    window: int | None = None
    overlap: int = 0
    cache: str | os.PathLike[str] | None = None
    null_text: int = 0

    def __post_init__(self) -> None:
        if self.null_text and (self.inverted_every != 1 or self.inversion_prompt is not None):
            raise ValueError(
                "null_text leads back to an inverted source: init=ddim_inversion and inversion_prompt=null"
            )
        if self.null_text and (self.negative_prompt or self.scheduler is not None):
            raise ValueError("null_text takes the place of negative_prompt, and samples by DDIM: leave scheduler out")
        if self.init not in INITS[1:3] and self.inverted_every is None and self.strength is None:
            raise ValueError(f"no init {self.init!r}: use {', '.join(INITS)}")
        if self.steps < 1 or (self.prompts_at_once is not None and self.prompts_at_once < 1):
            raise ValueError(f"steps={self.steps}, prompts_at_once={self.prompts_at_once}: at least one")
        if self.scheduler is not None:
            _scheduler_class(self.scheduler)

    @classmethod
    def of(cls, value: Sampling | Mapping[str, Any] | None) -> Sampling:
        """From a mapping of the fields.

        Raises:
            ValueError: an unknown field or value.
        """
        if isinstance(value, Sampling):
            return value
        unknown = sorted(set(value or {}) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"sample has no {', '.join(unknown)}")
        return cls(**(value or {}))

    @property
    def inverted_every(self) -> int | None:
        """Frames 0, n, 2 n, ... start from the inversion: n; None where none does."""
        kind, colon, number = self.init.partition(":")
        if kind != "ddim_inversion":
            return None
        if colon and not (number.isdecimal() and int(number)):
            raise ValueError(f"init={self.init!r}: ddim_inversion:EVERY with a whole number from 1")
        return int(number) if colon else 1

    def from_noise(self, frames: int) -> Tensor:
        """Which of the frames start from nothing but noise, `(f,)` bool."""
        mask = torch.full((frames,), self.strength is None)
        if self.inverted_every is not None:
            mask[:: self.inverted_every] = False
        return mask

    @property
    def strength(self) -> float | None:
        """How far SDEdit noises; None for other starts."""
        kind, _, number = self.init.partition(":")
        if kind != "sdedit":
            return None
        try:
            strength = float(number)
        except ValueError:
            strength = 0.0
        if not 0 < strength <= 1:
            raise ValueError(f"init={self.init!r}: sdedit:STRENGTH with a strength above 0 and at most 1")
        return strength


def _scheduler_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.SchedulerMixin):
        raise ValueError(f"diffusers has no scheduler {name!r}: DDIMScheduler, EulerDiscreteScheduler, ...")
    check_scheduler({"_class_name": name})
    return found


def starting_latents(pipe: TuneAVideoPipeline, latents: Tensor, caption: str, sampling: Sampling) -> Tensor:
    """What sampling starts from, `(1, c, f, h, w)`: inverted latents, noise, both, or (for SDEdit) the clean latents.

    Args:
        pipe: the model under test.
        latents: of the source, `(1, c, f, h, w)`.
        caption: of the source.
        sampling: says how.
    """
    if sampling.strength is not None:
        return latents
    generator = torch.Generator().manual_seed(sampling.seed)
    kind = "shared" if sampling.init == "shared_noise" else "iid"
    noise = frame_noise(tuple(latents.shape), kind, generator=generator).to(latents)
    if sampling.inverted_every is None:
        return noise
    prompt = caption if sampling.inversion_prompt is None else sampling.inversion_prompt
    options = {"window": sampling.window, "overlap": sampling.overlap, "cache": sampling.cache}
    inverted = pipe.invert(latents, prompt, sampling.steps, iterations=sampling.inversion_iters, **options)
    noise[:, :, :: sampling.inverted_every] = inverted[:, :, :: sampling.inverted_every]
    return noise


def edit(
    pipe: TuneAVideoPipeline,
    latents: Tensor,
    caption: str,
    prompts: Sequence[str],
    sampling: Sampling,
    start: Tensor | None = None,
) -> Tensor:
    """Edited clips `(P, 3, f, H, W)` in [0, 1], one for each prompt.

    Args:
        pipe: the tuned model.
        latents: of the source, `(1, c, f, h, w)`.
        caption: of the source.
        prompts: of the edits.
        sampling: says how.
        start: `starting_latents`, if known.
    """
    start = starting_latents(pipe, latents, caption, sampling) if start is None else start
    negative: dict[str, Any] = {"negative_prompt": sampling.negative_prompt}
    if sampling.null_text:
        frames = {"window": sampling.window, "overlap": sampling.overlap}
        path = pipe.invert(
            latents, caption, sampling.steps, iterations=sampling.inversion_iters, trajectory=True, **frames
        )
        scale, count = sampling.guidance_scale, sampling.null_text
        found = null_text_inversion(pipe, path, caption, scale, iterations=count, **frames)
        negative = {"negative_prompt_embeds": found}
    own = pipe.scheduler
    if sampling.scheduler is not None:
        pipe.scheduler = _scheduler_class(sampling.scheduler).from_config(own.config)
    try:
        size = sampling.prompts_at_once or len(prompts)
        videos = []
        for first in range(0, len(prompts), size):
            part = list(prompts[first : first + size])
            generators = [torch.Generator().manual_seed(sampling.seed + 1) for _ in part]
            videos.append(
                pipe(
                    part,
                    latents=start,
                    strength=sampling.strength,
                    num_inference_steps=sampling.steps,
                    guidance_scale=sampling.guidance_scale,
                    **negative,
                    eta=sampling.eta,
                    generator=generators,
                    window=sampling.window,
                    overlap=sampling.overlap,
                ).videos
            )
        return torch.cat(videos)
    finally:
        pipe.scheduler = own


def reconstruct(pipe: TuneAVideoPipeline, start: Tensor, caption: str, sampling: Sampling) -> Tensor:
    """The source as the model gives it back from its inversion, without guidance; `(3, f, H, W)` in [0, 1]."""
    prompt = caption if sampling.inversion_prompt is None else sampling.inversion_prompt
    options = {"num_inference_steps": sampling.steps, "window": sampling.window, "overlap": sampling.overlap}
    return pipe(prompt, latents=start, guidance_scale=1.0, **options).videos[0]


@dataclass
class Edits:
    """A clip and what was made of it; videos in [0, 1].

    sample_id, caption: of the source.
    source: `(3, f, H, W)`.
    inversion: what the model gives back from the inverted source, `(3, f, H, W)`; None for other starts.
    prompts: P texts.
    videos: `(P, 3, f, H, W)`.
    """

    sample_id: str
    caption: str
    source: Tensor
    inversion: Tensor | None
    prompts: list[str]
    videos: Tensor

    def columns(self) -> list[tuple[str, Tensor]]:
        """All videos with what they are, in the order of showing; several may have one prompt."""
        inversion = [] if self.inversion is None else [("inversion", self.inversion)]
        return [("source", self.source), *inversion, *zip(self.prompts, self.videos, strict=True)]

    def grid(self) -> np.ndarray:
        """Source, inversion and edits side by side: uint8 `(f, H', W', 3)`."""
        videos = torch.stack([video.float().cpu() for _, video in self.columns()])
        return video_grid(videos, n_rows=len(videos) if len(videos) <= 6 else 5)


def plain_scores(made: Edits) -> dict[str, Any]:
    """Readings that need no other model.

    `inversion_psnr` in dB, and per prompt `change` (mean distance from the source) and `flicker` (mean distance of
    neighbouring frames), both in percent of full scale; `source_flicker` to compare with.
    """
    scores: dict[str, Any] = {"source_flicker": _flicker(made.source), "edits": []}
    if made.inversion is not None:
        error = (made.inversion.cpu() - made.source.cpu()).square().mean().clamp(min=1e-10)
        scores["inversion_psnr"] = float(-10 * error.log10())
    for prompt, video in zip(made.prompts, made.videos, strict=True):
        change = 100 * float((video.cpu() - made.source.cpu()).abs().mean())
        scores["edits"].append({"prompt": prompt, "change": change, "flicker": _flicker(video)})
    return scores


def _flicker(video: Tensor) -> float:
    return 100 * float(video.diff(dim=1).abs().mean()) if video.shape[1] > 1 else 0.0
