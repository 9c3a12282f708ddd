"""A fixed bank of filters in place of a self-supervised ViT: features of the stand-in, without any weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.layers.precision import no_autocast
from core.layers.recorded import fixed

# Channels before the map: hexagonal chroma at two scales, luma, structure tensor, constant.
_CHANNELS = 9


class FilterBank(nn.Module):
    """Colour, brightness and texture of patches, as features in which what belongs to one object points one way.

    Per pixel: hexagonal chroma, blurred at two scales; luma; the structure tensor of luma; and a constant, which gives
    grey regions a common direction. The mean over each patch, divided by `scale`, goes through a fixed orthonormal map.

    Args:
        dim: channels C of a feature, at least 9.
        patch_size: side of a patch.
        scale: the mean length of a feature before the division; the default is that of the stand-in's training scenes.
        seed: of the map.

    Raises:
        ValueError: fewer than 9 channels.
    """

    def __init__(self, dim: int = 32, patch_size: int = 4, scale: float = 0.48, seed: int = 0) -> None:
        super().__init__()
        if dim < _CHANNELS:
            raise ValueError(f"FilterBank has {_CHANNELS} filters, they do not fit into {dim} channels")
        self.dim, self.patch_size, self.scale = dim, patch_size, scale
        generator = torch.Generator("cpu").manual_seed(seed)
        normal = torch.randn(dim, dim, generator=generator, device="cpu", dtype=torch.float64)
        basis, triangle = torch.linalg.qr(normal)
        # The signs of Q's columns are the library's choice; those of R's diagonal make them the same everywhere.
        basis = (basis * triangle.diagonal().sign())[:, :_CHANNELS]
        self.register_buffer("basis", basis.float().to(torch.get_default_device()), persistent=False)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """`(h, w)` of patches of pictures `(B, 3, H, W)`."""
        height, width = fixed(image, -2, -1)
        return height // self.patch_size, width // self.patch_size

    def forward(self, image: Tensor) -> Tensor:
        """Features `(B, h*w, C)` in row-major order of pictures `(B, 3, H, W)` with values in [0, 1]."""
        with no_autocast(image):
            patches = F.avg_pool2d(self.filters(image.float()), self.patch_size)
            return rearrange(patches, "b c h w -> b (h w) c") @ (self.basis.float().T / self.scale)

    def filters(self, image: Tensor) -> Tensor:
        """The bank's answer at every pixel, `(B, 9, H, W)`."""
        red, green, blue = image.unbind(1)
        chroma = torch.stack([(2 * red - green - blue) / 2, math.sqrt(3) / 2 * (green - blue)], dim=1)
        luma = image.mean(dim=1, keepdim=True)
        along, down = _slopes(_blur(luma, 0.7))
        texture = torch.cat([along * along, down * down, along * down], dim=1)
        return torch.cat(
            [
                _blur(chroma, 1.0),
                _blur(chroma, 2.5),
                0.3 * (_blur(luma, 1.0) - 0.5),
                20 * _blur(texture, 2.0),
                torch.full_like(luma, 0.4),
            ],
            dim=1,
        )


def _blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `(B, C, H, W)` with reflected borders; the kernel ends at four deviations."""
    radius = math.ceil(4 * sigma)
    at = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    batch, channels = maps.shape[:2]
    maps = F.pad(rearrange(maps, "b c h w -> (b c) 1 h w"), (radius,) * 4, mode="reflect")
    maps = F.conv2d(F.conv2d(maps, kernel[None, None, :, None]), kernel[None, None, None, :])
    return rearrange(maps, "(b c) 1 h w -> b c h w", b=batch, c=channels)


def _slopes(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of `(B, C, H, W)` along rows and down columns, with reflected borders."""
    wide = F.pad(maps, (1, 1, 1, 1), mode="reflect")
    along = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    down = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    return along, down
