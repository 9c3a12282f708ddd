"""ControlNets of image models on the frames of a video (Zhang et al. 2023): depth, pose, edges beside the prompt.

A frame is a row of the 2-D network; its residuals reach the video network in the same rows `(b f, ...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from torch import Tensor

from core.data import to_pil
from tune_a_video.models import fold

Frames = Tensor | np.ndarray | Sequence[Image.Image]
Share = float | Sequence[float]


def as_networks(controlnet: Any) -> list[ControlNetModel]:
    """One, several or none as a list.

    Raises:
        ValueError: something else than ControlNets of diffusers.
    """
    if controlnet is None:
        return []
    if isinstance(controlnet, MultiControlNetModel):
        return list(controlnet.nets)
    networks = list(controlnet) if isinstance(controlnet, list | tuple) else [controlnet]
    for network in networks:
        if not isinstance(network, ControlNetModel):
            raise ValueError(f"controlnet is a {type(network).__name__}: give a diffusers ControlNetModel, or a list")
    return networks


def as_module(controlnet: Any) -> ControlNetModel | MultiControlNetModel | None:
    """The form in which a pipeline holds one, several or none."""
    networks = as_networks(controlnet)
    return MultiControlNetModel(networks) if len(networks) > 1 else next(iter(networks), None)


@dataclass(frozen=True)
class Control:
    """What guides a call.

    networks: ControlNets.
    pictures: for each its frames `(b, f, 3, H, W)` in [0, 1].
    scales: of the residuals of each.
    spans: shares of the steps between which each takes part.
    """

    networks: list[ControlNetModel]
    pictures: list[Tensor]
    scales: list[float]
    spans: list[tuple[float, float]]

    def residuals(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, steps: tuple[int, int], frames: Sequence[int]
    ) -> dict[str, Any]:
        """Arguments for the video network: the residuals of all networks whose span holds this step, added up.

        Args:
            noisy: latents `(b, c, f, h, w)`; b may be twice the videos, for guidance.
            timestep: of all rows.
            text: `(b, L, d)`.
            steps: steps that are done, and all.
            frames: numbers of the clip's frames that `noisy` has.
        """
        each_text = text.repeat_interleave(noisy.shape[2], dim=0)
        down: list[Tensor] | None = None
        middle: Tensor | None = None
        parts = zip(self.networks, self.pictures, self.scales, self.spans, strict=True)
        for network, pictures, scale, (begin, end) in parts:
            # A step belongs to a span that holds all of it, as in diffusers.
            if steps[0] / steps[1] < begin or (steps[0] + 1) / steps[1] > end:
                continue
            picture = pictures[:, list(frames)].repeat(len(noisy) // len(pictures), 1, 1, 1, 1).flatten(0, 1)
            picture, rows, states = (x.to(network.device, network.dtype) for x in (picture, fold(noisy), each_text))
            options = {"encoder_hidden_states": states, "controlnet_cond": picture, "conditioning_scale": scale}
            more, centre = network(rows, timestep, **options, return_dict=False)
            more, centre = [part.to(text.dtype) for part in more], centre.to(text.dtype)
            down = more if down is None else [a + b for a, b in zip(down, more, strict=True)]
            middle = centre if middle is None else middle + centre
        if down is None:
            return {}
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def prepare(
    controlnet: Any,
    frames: Any,
    scale: Share,
    start: Share,
    end: Share,
    *,
    videos: int,
    latents: Tensor,
    unit: int,
) -> Control | None:
    """What guides a call, from what a user gives; None without ControlNets.

    Args:
        controlnet: see `as_networks`.
        frames: of one network: `(f, 3, H, W)` or `(b, f, 3, H, W)` in [0, 1], arrays with colours last, or a list of
            pictures; of several networks: a list of those. One clip serves all videos. uint8 counts as 0 to 255.
        scale: strength of each network, or of all.
        start, end: span of the steps in which a network takes part, as shares from 0 to 1.
        videos: b.
        latents: `(b, c, f, h, w)`, whose frames and size the control frames have to match.
        unit: pixels of a latent.

    Raises:
        ValueError: frames without a network or the other way round, or other counts or sizes than the video's.
    """
    networks = as_networks(controlnet)
    if not networks:
        if frames is not None:
            raise ValueError("control frames need a network: give controlnet= here, or when the pipeline is made")
        return None
    if frames is None:
        raise ValueError(f"{len(networks)} ControlNet(s), but no frames for them: give control_video=")
    each = [frames] if len(networks) == 1 else frames
    if not isinstance(each, list | tuple) or len(each) != len(networks):
        raise ValueError(f"{len(networks)} ControlNets need a list of {len(networks)} control videos, one for each")
    shares = {
        name: _each(value, len(networks), name)
        for name, value in (
            ("controlnet_conditioning_scale", scale),
            ("control_guidance_start", start),
            ("control_guidance_end", end),
        )
    }
    _, begins, ends = shares.values()
    for begin, stop in zip(begins, ends, strict=True):
        if not 0 <= begin < stop <= 1:
            raise ValueError(f"control guidance from {begin} to {stop}: shares of the steps, 0 <= start < end <= 1")
    sized = [_fitting(one, videos, latents, unit).to(latents.device) for one in each]
    return Control(networks, sized, shares["controlnet_conditioning_scale"], list(zip(begins, ends, strict=True)))


def _each(value: Share, count: int, name: str) -> list[float]:
    values = [float(one) for one in value] if isinstance(value, Sequence) else [float(value)] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} numbers for {count} ControlNets: give one, or one for each")
    return values


def _fitting(frames: Frames, videos: int, latents: Tensor, unit: int) -> Tensor:
    """`(b, f, 3, H, W)` in [0, 1], as many frames of the size that the latents ask for."""
    picture = _tensor(frames)
    count, height, width = latents.shape[2], latents.shape[3] * unit, latents.shape[4] * unit
    if picture.shape[1] != count:
        raise ValueError(f"control_video has {picture.shape[1]} frames, the video {count}: give one for each frame")
    if picture.shape[-2:] != (height, width):
        raise ValueError(
            f"control_video is {picture.shape[-2]} x {picture.shape[-1]} pixels, the video {height} x {width}: "
            "make its frames of that size first"
        )
    if len(picture) not in (1, videos):
        raise ValueError(f"{len(picture)} control videos for {videos} videos: give one for all, or one for each")
    return picture.expand(videos, -1, -1, -1, -1)


def _tensor(frames: Frames) -> Tensor:
    """`(b, f, 3, H, W)`, float32 in [0, 1]."""
    if isinstance(frames, Sequence) and frames and all(isinstance(frame, Image.Image) for frame in frames):
        frames = np.stack([np.asarray(to_pil(frame)) for frame in frames])
    if isinstance(frames, np.ndarray) and frames.ndim in (4, 5) and frames.shape[-1] == 3:
        frames = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3)
    if not isinstance(frames, Tensor) or frames.ndim not in (4, 5) or frames.shape[-3] != 3:
        found = tuple(frames.shape) if isinstance(frames, Tensor | np.ndarray) else type(frames).__name__
        raise ValueError(f"control_video is {found}: (f, 3, H, W) or (b, f, 3, H, W) in [0, 1], or a list of pictures")
    frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
    if frames.min() < 0 or frames.max() > 1:
        raise ValueError(f"control_video has values from {frames.min():.3g} to {frames.max():.3g}: 0 to 1 is expected")
    return frames[None] if frames.ndim == 4 else frames
