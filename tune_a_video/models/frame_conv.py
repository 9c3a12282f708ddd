"""Convolution over frames behind residual blocks, an option of other work (Make-A-Video, FateZero), not the paper's."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tune_a_video.models.frames import FrameCount

CONVS = ("none", "conv3", "lora")

# Of the low-rank form: channels are divided by this, so that it costs about a quarter of the parameters.
_NARROWER = 8


class FrameConv(nn.Module):
    """`x + conv(x)` over the frames of every place, starting as the identity.

    Args:
        channels: c.
        count: how many frames make a video; shared with the network.
        low_rank: through c / 8 channels.
    """

    def __init__(self, channels: int, count: FrameCount, low_rank: bool = False) -> None:
        super().__init__()
        self.count = count
        inner = max(1, channels // _NARROWER) if low_rank else channels
        self.inner = nn.Conv1d(channels, inner, kernel_size=3, padding=1) if low_rank else nn.Identity()
        self.outer = nn.Conv1d(inner, channels, kernel_size=1 if low_rank else 3, padding=0 if low_rank else 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Rows `(b f, c, h, w)` to the same."""
        lines = x.unflatten(0, (-1, self.count.frames)).permute(0, 3, 4, 2, 1).flatten(0, 2)
        change = self.outer(self.inner(lines)).unflatten(0, (-1, *x.shape[2:]))
        return x + change.permute(0, 4, 3, 1, 2).flatten(0, 1)


class FrameConvResnetBlock(ResnetBlock2D):
    """A residual block of diffusers with a `FrameConv` behind it, as `conv_temp`."""

    conv_temp: FrameConv

    @classmethod
    def around(cls, block: ResnetBlock2D, count: FrameCount, kind: str) -> FrameConvResnetBlock:
        """The same block (same parameters, same keys) with a convolution behind it.

        Args:
            block: of any 2-D network; it must not be used on its own afterwards.
            count: how many frames make a video.
            kind: `conv3` or `lora`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update(block.__dict__)
        made._modules = dict(block._modules)
        weight = block.conv2.weight
        made.conv_temp = FrameConv(block.out_channels, count, low_rank=kind == "lora")
        made.conv_temp.to(device=weight.device, dtype=weight.dtype)
        return made.train(block.training)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Rows `(b f, c, h, w)` to the same; other arguments are the parent's."""
        return self.conv_temp(super().forward(input_tensor, temb, *args, **kwargs))
