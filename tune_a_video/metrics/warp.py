"""Warp error: how much of a video's change from frame to frame its motion does not explain.

Lai et al. 2018 (Learning Blind Video Temporal Consistency), with torchvision's RAFT for the flow.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchvision.models.optical_flow import raft_large, raft_small

from core.checkpoint import load, load_state
from core.errors import ConfigError

_LEAST = 128  # RAFT's correlation pyramid needs that many pixels


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Frames fetched along a flow: value at x is that of `frames` at x + flow(x).

    Args:
        frames: (B, C, H, W).
        flow: (B, 2, H, W) in pixels, x first.

    Returns:
        (B, C, H, W), bilinear; beyond the border the border's value.
    """
    height, width = frames.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(n, device=flow.device) for n in (height, width)), indexing="ij")
    place = torch.stack([x, y]) + flow
    scale = torch.tensor([width, height], device=flow.device).view(1, 2, 1, 1)
    grid = (2 * place + 1) / scale - 1
    return F.grid_sample(frames, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels that both frames show, (B, H, W) bool: following the flow there and back ends near the start.

    The bound is 1 % of the squared lengths and half a squared pixel (Sundaram et al. 2010). Pixels that leave the
    picture are not visible.

    Args:
        forward: flow from the first frames to the second, (B, 2, H, W) in pixels.
        backward: flow from the second to the first.
    """
    back = warp(backward, forward)
    there_and_back = forward + back
    lengths = forward.square().sum(1) + back.square().sum(1)
    height, width = forward.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(n, device=forward.device) for n in (height, width)), indexing="ij")
    ends_x, ends_y = x + forward[:, 0], y + forward[:, 1]
    inside = (ends_x >= 0) & (ends_x <= width - 1) & (ends_y >= 0) & (ends_y <= height - 1)
    return (there_and_back.square().sum(1) < 0.01 * lengths + 0.5) & inside


def warp_error(video: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """Mean squared difference between each frame and the next one fetched back along the flow.

    Args:
        video: (f, 3, H, W) in [0, 1].
        forward: flow from each frame to the next, (f - 1, 2, H, W) in pixels.
        backward: flow from each next frame back.

    Returns:
        A scalar, mean over colours and over the pixels that both frames show; 0 where they share none.
    """
    shown = visible(forward, backward)[:, None]
    difference = (warp(video[1:], forward) - video[:-1]).square()
    return (difference * shown).sum() / (shown.sum() * video.shape[1]).clamp(min=1)


class WarpError(Metric):
    """The mean warp error of videos, times 1000, under the flow of their sources where these are given.

    Args:
        weights: file of RAFT's weights, as torchvision publishes them (raft_large_C_T_SKHT_V2-ff5fadd5.pth).
        model: `large` or `small`.
        updates: iterations of the flow.
        chunk: pairs of frames in one forward pass.

    Raises:
        ConfigError: another model.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(
        self,
        weights: str | os.PathLike,
        model: Literal["large", "small"] = "large",
        updates: int = 12,
        chunk: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if model not in ("large", "small"):
            raise ConfigError(f"WarpError: model={model}: large or small")
        raft: nn.Module = (raft_large if model == "large" else raft_small)(weights=None, progress=False)
        load_state(raft, load(weights))
        self.raft = raft.eval().requires_grad_(False)
        self.updates, self.chunk = updates, chunk
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, videos: Tensor, sources: Tensor | None = None) -> None:
        """Takes videos.

        Args:
            videos: (b, 3, f, H, W) in [0, 1].
            sources: whose motion they should have, of the same shape; None: their own.

        Raises:
            ValueError: another shape, one frame, or frames that RAFT cannot take.
        """
        motion = videos if sources is None else sources
        if videos.ndim != 5 or videos.shape[1] != 3 or videos.shape[2] < 2 or motion.shape != videos.shape:
            raise ValueError(
                f"videos are {tuple(videos.shape)}, sources {tuple(motion.shape)}: (b, 3, f, H, W), two frames or more"
            )
        height, width = videos.shape[-2:]
        if height % 8 or width % 8 or min(height, width) < _LEAST:
            raise ValueError(f"frames are {height} x {width}: RAFT takes multiples of 8, from {_LEAST} on")
        for video, moving in zip(videos.float().transpose(1, 2), motion.float().transpose(1, 2), strict=True):
            forward, backward = self._flow(moving[:-1], moving[1:]), self._flow(moving[1:], moving[:-1])
            self.total += warp_error(video, forward, backward).double()
            self.count += 1

    @torch.no_grad()
    def _flow(self, first: Tensor, second: Tensor) -> Tensor:
        pairs = zip(first.split(self.chunk), second.split(self.chunk), strict=True)
        return torch.cat([self.raft(2 * a - 1, 2 * b - 1, num_flow_updates=self.updates)[-1] for a, b in pairs])

    def compute(self) -> Tensor:
        """The mean over videos."""
        return 1000 * self.total / self.count
