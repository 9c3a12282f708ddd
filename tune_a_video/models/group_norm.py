"""Group normalisation whose statistics run over the frames of a video together, as the released code has it."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tune_a_video.models.frames import FrameCount

GROUP_NORMS = ("joint", "per_frame")


class FrameGroupNorm(nn.GroupNorm):
    """Group norm of rows `(b f, c, h, w)`: mean and variance of a group over its channels, all frames and all places.

    The paper does not mention it; in the released code 5-D tensors reach the norms of the residual blocks.

    Args:
        groups, channels, eps, affine: see `torch.nn.GroupNorm`.
        count: how many frames make a video; shared with the network.
    """

    def __init__(self, groups: int, channels: int, eps: float, affine: bool, count: FrameCount) -> None:
        super().__init__(groups, channels, eps, affine)
        self.count = count

    @classmethod
    def around(cls, norm: nn.GroupNorm, count: FrameCount) -> FrameGroupNorm:
        """The same norm (same parameters) over frames."""
        made = cls(norm.num_groups, norm.num_channels, norm.eps, False, count)
        made.affine, made.weight, made.bias = norm.affine, norm.weight, norm.bias
        return made.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Rows `(b f, c, h, w)` to the same."""
        if self.count.frames == 1:
            return super().forward(input)
        videos = self.count.videos(len(input))
        video = rearrange(input, "(b f) c h w -> b c f h w", b=videos)
        normed = F.group_norm(video, self.num_groups, self.weight, self.bias, self.eps)
        return rearrange(normed, "b c f h w -> (b f) c h w")
