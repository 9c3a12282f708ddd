"""Group normalisation whose statistics run over the frames of a video together, as the released code has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_a_video.models.frames import FrameCount, fold, recorded, unfold

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
        frames, videos = self.count.frames, self.count.videos(input.shape[0])
        kind = input.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            input = input.float()  # as autocast has it for every group norm
        trains = torch.is_grad_enabled() and (input.requires_grad or (self.affine and self.weight.requires_grad))
        if input.dtype == torch.float32 and not trains and not recorded():
            return self._from_frames(input, videos)
        normed = F.group_norm(unfold(input, frames), self.num_groups, self.weight, self.bias, self.eps)
        return fold(normed)

    def _from_frames(self, rows: Tensor, videos: int) -> Tensor:
        """The same from every frame's own statistics, without copies in another order; no gradients.

        Each frame is normalised by itself, then scaled and shifted to the mean and variance of all: that of the frames'
        means adds to the mean of their variances. In half precision the statistics would be too coarse for it.
        """
        count, channels, groups = len(rows), rows.shape[1], self.num_groups
        places = rows.shape[2:].numel()
        out, mean, inverse = torch.native_group_norm(rows, None, None, count, channels, places, groups, self.eps)
        mean, inverse = (x.view(videos, -1, groups) for x in (mean, inverse))
        joint = mean.mean(dim=1, keepdim=True)
        variance = (inverse.pow(-2) - self.eps + (mean - joint).square()).mean(dim=1, keepdim=True)
        joint_inverse = (variance + self.eps).rsqrt()
        scale, shift = (
            x.repeat_interleave(channels // groups, dim=2).view(count, channels, 1, 1)
            for x in (joint_inverse / inverse, (mean - joint) * joint_inverse)
        )
        if self.affine:
            weight, bias = (x.detach().float().view(1, channels, 1, 1) for x in (self.weight, self.bias))
            scale, shift = scale * weight, shift * weight + bias
        return out.mul_(scale).add_(shift)
