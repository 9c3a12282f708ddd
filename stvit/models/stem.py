"""From an image to raster tokens: a patch projection (DeiT) or a small convolutional stem (STViT-R)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stvit.models.sizes import fixed


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


class ConvNormAct(nn.Module):
    """3x3 convolution of stride 2, batch norm, hard swish.

    In evaluation the norm is an affine map per channel and goes into the convolution's weights on the fly: the same
    result (up to rounding) in one pass less over the largest maps of the model.

    Args:
        width_in: channels in.
        width_out: channels out.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width_out)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width_in, H, W)` to `(B, width_out, ceil(H/2), ceil(W/2))`."""
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
) -> PatchStem | ConvStem:
    """The stem named `kind`: `patch` (with `bias`, and a norm where `norm_eps` is given) or `conv` (with `pad`).

    Raises:
        ValueError: unknown kind.
    """
    if kind == "patch":
        return PatchStem(patch_size, in_chans, dim, norm_eps=norm_eps, bias=bias)
    if kind == "conv":
        return ConvStem(patch_size, in_chans, dim, pad=pad)
    raise ValueError(f"unknown stem {kind!r}: use 'patch' or 'conv'")
