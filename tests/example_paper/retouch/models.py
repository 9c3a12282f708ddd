"""Two plain modules; nothing in this file knows of the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Restorer(nn.Module):
    """An image without its hole: `depth` convolutions of 3 x 3 over the image and the hole's mask.

    Args:
        width: channels.
        depth: layers before the head.
        paste: only the hole is painted; else the whole image.
    """

    def __init__(self, width: int = 16, depth: int = 3, paste: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width if i else 4, width, 3, padding=1) for i in range(depth))
        self.head = nn.Conv2d(width, 3, 1)
        self.paste = paste

    def forward(self, damaged: Tensor, hole: Tensor) -> Tensor:
        """The restored image, of `damaged` `(B, 3, H, W)` in [0, 1] and `hole` `(B, 1, H, W)`, 1 inside of it."""
        x = torch.cat([damaged, hole], dim=1)
        for layer in self.layers:
            x = layer(x).relu()
        painted = self.head(x).sigmoid()
        return torch.lerp(damaged, painted, hole) if self.paste else painted


class Critic(nn.Module):
    """How real every patch of an image is: logits `(B, 1, H/4, W/4)`.

    Args:
        width: channels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 4, stride=2, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits of `image` `(B, 3, H, W)`."""
        return self.layers(image)
