"""From an image to raster tokens: a patch projection (DeiT) or a small convolutional stem (STViT-R, LV-ViT)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.layers.recorded import fixed


class PatchStem(nn.Module):
    """Non-overlapping patches, each projected linearly.

    Images whose sides are no multiple of the patch are zero-padded at the bottom and right.

    Args:
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        dim: channels of the tokens.
        norm_eps: epsilon of a layer norm over the channels of each token, as Swin has it; None: no norm (ViT).
        bias: of the projection.
    """

    def __init__(
        self, patch_size: int, in_chans: int, dim: int, *, norm_eps: float | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` to a token map `(B, dim, ceil(H/p), ceil(W/p))`."""
        tokens = self.proj(pad_image(image, self.patch_size))
        if isinstance(self.norm, nn.Identity):
            return tokens
        return rearrange(self.norm(rearrange(tokens, "b c h w -> b h w c")), "b h w c -> b c h w")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height` x `width` pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each with batch norm and hard swish, until one token covers a patch.

    With `patch_size=4` this is the stem of the released STViT-R (two convolutions, C/2 then C channels); other powers
    of two have fewer or more steps, the width doubling at each.

    Args:
        patch_size: total stride, a power of two from 2 on.
        in_chans: channels of the image.
        dim: channels of the tokens.
        pad: whether images are first zero-padded at the bottom and right to a multiple of `patch_size`, as the
            released detection backbone does; otherwise the convolutions round up by themselves (other values at the
            last row and column of odd images).

    Raises:
        ValueError: `patch_size` is no power of two, or `dim` cannot be halved often enough.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, pad: bool = False) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 1 << steps:
            raise ValueError(f"stem='conv' halves the image repeatedly: patch_size={patch_size} must be 2, 4, 8 or 16")
        if dim % (1 << (steps - 1)):
            raise ValueError(f"stem='conv' with patch_size={patch_size} needs embed_dim % {1 << (steps - 1)} == 0")
        self.steps = steps
        widths = [in_chans, *(dim >> (steps - 1 - i) for i in range(steps))]
        self.pad = pad
        self.stages = nn.Sequential(*(ConvNormAct(widths[i], widths[i + 1]) for i in range(steps)))

    def forward(self, image: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` to a token map `(B, dim, ceil(H/p), ceil(W/p))`."""
        image = pad_image(image, 1 << self.steps) if self.pad else image
        # In this layout the result is already a raster of tokens, and convolutions on CPU are faster.
        return self.stages(image.contiguous(memory_format=torch.channels_last))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height` x `width` pixels."""
        return -(-height // (1 << self.steps)), -(-width // (1 << self.steps))


class HalfConvStem(nn.Module):
    """LV-ViT's stem: convolutions at half the resolution, then patches of half the size.

    A 7x7 convolution of stride 2 and two 3x3 ones, each with batch norm and ReLU; their maps are cut into patches that
    are projected linearly. Images whose sides are no multiple of the patch are zero-padded at the bottom and right.

    Args:
        patch_size: side of a patch in pixels, even.
        in_chans: channels of the image.
        dim: channels of the tokens.
        width: channels of the convolutions.

    Raises:
        ValueError: `patch_size` is odd.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, width: int = 64) -> None:
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"stem='half_conv' halves the image once: patch_size={patch_size} must be even")
        self.patch_size = patch_size
        self.stages = nn.Sequential(
            ConvNormAct(in_chans, width, kernel=7, act=nn.ReLU),
            *(ConvNormAct(width, width, stride=1, act=nn.ReLU) for _ in range(2)),
        )
        self.proj = nn.Conv2d(width, dim, kernel_size=patch_size // 2, stride=patch_size // 2)

    def forward(self, image: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` to a token map `(B, dim, ceil(H/p), ceil(W/p))`."""
        image = pad_image(image, self.patch_size)
        return self.proj(self.stages(image.contiguous(memory_format=torch.channels_last)))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image of `height` x `width` pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)


class ConvNormAct(nn.Module):
    """Convolution, batch norm and activation; by default 3x3 of stride 2 with hard swish.

    In evaluation the norm is an affine map per channel and goes into the convolution's weights on the fly: the same
    result (up to rounding) in one pass less over the largest maps of the model.

    Args:
        width_in: channels in.
        width_out: channels out.
        kernel: side of the kernel, odd.
        stride: of the convolution.
        act: class of the activation.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        kernel: int = 3,
        stride: int = 2,
        act: Callable[[], nn.Module] = nn.Hardswish,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width_out)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width_in, H, W)` to `(B, width_out, ceil(H/stride), ceil(W/stride))`."""
        if self.norm.training:
            return self.act(self.norm(self.conv(x)))
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        weight = self.conv.weight * rearrange(scale, "c -> c 1 1 1")
        bias = self.norm.bias - self.norm.running_mean * scale
        return self.act(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))


def pad_image(image: Tensor, multiple: int) -> Tensor:
    """Zero rows and columns at the bottom and right of `(B, C, H, W)` up to a multiple of `multiple`."""
    missing = tuple(-side % multiple for side in fixed(image, 2, 3))
    return F.pad(image, (0, missing[1], 0, missing[0])) if any(missing) else image


def build_stem(
    kind: str,
    patch_size: int,
    in_chans: int,
    dim: int,
    *,
    norm_eps: float | None = None,
    pad: bool = False,
    bias: bool = True,
) -> PatchStem | ConvStem | HalfConvStem:
    """The stem named `kind`: `patch` (with `bias`, and a norm where `norm_eps` is given), `conv` (with `pad`) or
    `half_conv`.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "patch":
        return PatchStem(patch_size, in_chans, dim, norm_eps=norm_eps, bias=bias)
    if kind == "conv":
        return ConvStem(patch_size, in_chans, dim, pad=pad)
    if kind == "half_conv":
        return HalfConvStem(patch_size, in_chans, dim)
    raise ValueError(f"unknown stem {kind!r}: use 'patch', 'conv' or 'half_conv'")
