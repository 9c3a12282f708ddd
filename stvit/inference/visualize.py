"""Pictures of what semantic tokens attend to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core.output.figure import figure_pixels

# Lightness of the assignment's colours; dark enough for white panels, bright enough for black digits.
_SATURATION, _VALUE = 0.75, 1.0


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Token maps `(B, S, H', W')` on the grid of image tokens, enlarged bilinearly to `(B, S, *size)`."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def to_rgb(images: Tensor) -> Tensor:
    """Images `(B, 1 or 3, H, W)` of any range as `(B, 3, H, W)` in [0, 1], each stretched to its own extremes."""
    flat = images.float().flatten(1)
    low, high = flat.amin(1)[:, None, None, None], flat.amax(1)[:, None, None, None]
    images = (images.float() - low) / (high - low).clamp_min(1e-6)
    return images.expand(-1, 3, -1, -1)


def assignment(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Which token looks most at each position, and how much the position is looked at.

    Args:
        maps: `(B, S, H, W)`, every map sums to 1.

    Returns:
        Token index `(B, H, W)`, and the attention that all tokens together give to a position, in units of even
        attention, `(B, H, W)`.
    """
    total = maps.mean(dim=1) * (maps.shape[-2] * maps.shape[-1])
    return maps.argmax(dim=1), total


def token_colours(count: int) -> np.ndarray:
    """`(count, 3)` colours in [0, 1] that differ well: hues a golden ratio apart."""
    from matplotlib.colors import hsv_to_rgb

    hues = (0.05 + np.arange(count) * 0.618034) % 1.0
    return hsv_to_rgb(np.stack([hues, np.full(count, _SATURATION), np.full(count, _VALUE)], axis=1))


def token_picture(
    images: Tensor,
    maps: Tensor,
    captions: Sequence[str] | None = None,
    title: str | None = None,
) -> np.ndarray:
    """One row an image: the image, its regions by token, and the attention map of every token over it.

    Args:
        images: `(B, 1 or 3, H, W)`, any range.
        maps: `(B, S, H', W')` from `SemanticTokenViT.token_maps`.
        captions: a line for each image, e.g. its prediction.
        title: above everything.

    Returns:
        `(height, width, 3)` uint8.
    """
    from matplotlib.figure import Figure

    rgb = to_rgb(images.detach().cpu())
    maps = enlarge(maps.detach().float().cpu(), rgb.shape[-2:])
    batch, count = maps.shape[:2]
    colours = token_colours(count)
    regions = _regions(rgb, maps, colours)
    heat = _heat(rgb, maps)

    columns = min(count, 16)
    lines = -(-count // columns)
    panel = 0.62
    left, top = (0.75 if captions else 0.1), (0.62 if title else 0.36)
    width = left + panel * (columns + 2 * lines + 0.4) + 0.1
    height = top + batch * (panel * lines + 0.06) + 0.06
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def place(picture: np.ndarray, x: float, y: float, side: float, edge: object = None) -> None:
        axes = figure.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
        axes.imshow(picture, interpolation="nearest" if picture.shape[0] < 100 else "antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(edge is not None)
            spine.set_edgecolor(edge)
            spine.set_linewidth(1.6)

    def write(text: str, x: float, y: float, **style: object) -> None:
        figure.text(x / width, 1 - y / height, text, **({"fontsize": 7, "ha": "center", "va": "bottom"} | style))

    big = panel * lines
    maps_at = left + 2 * big + 0.4 * panel
    if title:
        write(title, left, 0.3, fontsize=9, ha="left", weight="bold")
    write("image", left + big / 2, top - 0.05)
    write("regions", left + 1.5 * big, top - 0.05)
    for token in range(columns):
        write(
            str(token + 1),
            maps_at + panel * (token + 0.5),
            top - 0.05,
            color=tuple(0.75 * colours[token]),
            weight="bold",
        )
    for row in range(batch):
        y = top + row * (big + 0.06)
        if captions:
            write(captions[row], left - 0.08, y + big / 2, ha="right", va="center")
        place(rgb[row].permute(1, 2, 0).numpy(), left, y, big * 0.96)
        place(regions[row], left + big, y, big * 0.96)
        for token in range(count):
            line, column = divmod(token, columns)
            place(
                heat[row, token], maps_at + column * panel, y + line * panel, panel * 0.92, edge=tuple(colours[token])
            )
    return figure_pixels(figure)


def _regions(rgb: Tensor, maps: Tensor, colours: np.ndarray) -> np.ndarray:
    """The image in grey, tinted with the colour of the token that looks most at each position: `(B, H, W, 3)`."""
    owner, total = assignment(maps)
    tint = torch.from_numpy(colours).float()[owner]
    # A quantile, not the maximum: all tokens often share one peak, beside which everything else would be black.
    ceiling = total.flatten(1).quantile(0.9, dim=1)[:, None, None].clamp_min(1e-6)
    strength = (total / ceiling).clamp(max=1).sqrt()[..., None]
    grey = rgb.mean(dim=1)[..., None]
    return ((0.35 + 0.65 * grey) * tint * strength + grey * (1 - strength) * 0.6).clamp(0, 1).numpy()


def _heat(rgb: Tensor, maps: Tensor) -> np.ndarray:
    """Attention in false colours over the faint image: `(B, S, H, W, 3)`; the brightest colour is a map's maximum."""
    from matplotlib import colormaps

    peak = maps / maps.amax(dim=(2, 3), keepdim=True)
    coloured = colormaps["inferno"](peak.numpy())[..., :3]
    grey = rearrange(rgb.mean(dim=1), "b h w -> b 1 h w 1").numpy()
    weight = peak.sqrt().numpy()[..., None]
    return np.clip(weight * coloured + (1 - weight) * (0.45 * grey), 0, 1)
