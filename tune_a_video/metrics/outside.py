"""What an edit has changed beside its object: PSNR and LPIPS of the pixels outside a mask."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from core.checkpoint import load
from core.checkpoint.weights import load_state
from core.errors import ConfigError
from tune_a_video.metrics.means import Means, check_videos


def outside_psnr(video: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """PSNR in dB over the pixels outside a mask; 100 where they are equal.

    Args:
        video, source: `(3, f, H, W)` in [0, 1].
        mask: `(f, H, W)` bool, True inside of the edited object.
    """
    outside = ~mask.expand_as(source)
    return peak_signal_noise_ratio(video[outside], source[outside], data_range=1.0).clamp(max=100.0)


def outside_lpips(video: Tensor, source: Tensor, mask: Tensor, network: nn.Module) -> Tensor:
    """LPIPS of the frames once the source stands inside the mask of both, mean over frames.

    Args:
        video, source, mask: see `outside_psnr`.
        network: two batches `(n, 3, H, W)` in [-1, 1] to distances of n values.
    """
    mixed = torch.where(mask, source, video)
    first, second = (2 * x.transpose(0, 1) - 1 for x in (mixed, source))
    return network(first, second).mean()


def lpips_network(backbone: str | os.PathLike[str]) -> nn.Module:
    """LPIPS on AlexNet: torchmetrics' network and linear layers, with a backbone from a local file.

    Args:
        backbone: torchvision's `alexnet-owt-7be5be79.pth`.

    Raises:
        core.checkpoint.CheckpointReadError: the file is missing or damaged.
        core.checkpoint.StateMismatch: it is of another network.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(net="alex", pnet_rand=True)
    # Its parts bear the numbers that the layers have in torchvision's `features`.
    layers = {number: layer for part in network.net.children() for number, layer in part.named_children()}
    state = {name: value for name, value in load(backbone).items() if name.startswith("features.")}
    load_state(nn.ModuleDict({"features": nn.ModuleDict(layers)}), state)
    return network.eval().requires_grad_(False)


class OutsideScores(Means):
    """Means over videos of `outside_psnr` (dB) and, where a network is given, `outside_lpips`.

    Args:
        lpips: file of AlexNet's weights (see `lpips_network`), or a network of the same form; None: PSNR alone.

    Raises:
        ConfigError: `lpips` is neither.
    """

    def __init__(self, lpips: str | os.PathLike[str] | nn.Module | None = None, **options: Any) -> None:
        super().__init__(("outside_psnr", *(("outside_lpips",) if lpips is not None else ())), **options)
        if lpips is not None and not isinstance(lpips, str | os.PathLike | nn.Module):
            raise ConfigError(f"lpips={lpips!r}: a file of AlexNet's weights, or null")
        self.lpips = lpips if lpips is None or isinstance(lpips, nn.Module) else lpips_network(lpips)

    @torch.no_grad()
    def update(self, videos: Tensor, sources: Tensor, masks: Tensor) -> None:
        """Takes videos.

        Args:
            videos, sources: `(b, 3, f, H, W)` in [0, 1].
            masks: `(b, f, H, W)`, above 0 inside of the edited object; such a clip must leave a pixel outside.

        Raises:
            ValueError: shapes that do not fit, or a mask that leaves nothing outside.
        """
        check_videos(videos)
        inside = masks > 0
        if sources.shape != videos.shape or inside.shape != (len(videos), *videos.shape[2:]):
            raise ValueError(
                f"videos are {tuple(videos.shape)}, sources {tuple(sources.shape)}, masks {tuple(masks.shape)}: "
                "(b, 3, f, H, W) twice and (b, f, H, W)"
            )
        for i, (video, source, mask) in enumerate(zip(videos.float(), sources.float(), inside, strict=True)):
            if mask.all():
                raise ValueError(f"the mask of video {i} covers every pixel: nothing is outside")
            values = {"outside_psnr": outside_psnr(video, source, mask)}
            if self.lpips is not None:
                values["outside_lpips"] = outside_lpips(video, source, mask, self.lpips)
            self.add(values)
