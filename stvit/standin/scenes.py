"""Scenes for detection: several glyphs that may hide each other, among strokes of the same colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stvit.standin.glyphs import GLYPHS, _colour, _gratings, _inside, _stroke, _unit_coordinates, to_pixels


@dataclass(frozen=True)
class Glyph:
    """One visible object of a scene.

    shape: index into `stvit.standin.glyphs.GLYPHS`.
    mask: (S, S) bool, the visible part.
    hidden: share of its pixels that later glyphs cover.
    """

    shape: int
    mask: np.ndarray
    hidden: float


def render_scene(
    rng: np.random.Generator,
    size: int,
    *,
    glyphs: tuple[int, int] = (1, 5),
    radius: tuple[float, float] = (0.07, 0.17),
    clutter: int = 8,
    most_hidden: float = 0.6,
) -> tuple[np.ndarray, list[Glyph]]:
    """A picture, uint8 (S, S, 3), and its objects from back to front.

    Backgrounds, colours, shapes and their slight rotation are GlyphField's; here glyphs are painted one over the other.
    A glyph that would hide too much of an earlier one is placed anew.

    Args:
        rng: all randomness.
        size: side S in pixels.
        glyphs: fewest and most objects.
        radius: smallest and largest radius in units of S.
        clutter: strokes behind the objects.
        most_hidden: largest hidden share of an object.
    """
    y, x = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32), indexing="ij")
    bounds = (radius[0] * size, radius[1] * size)
    image = _gratings(rng, x, y, size / 28)
    for _ in range(clutter):
        image[:, _stroke(rng, x, y, bounds)] = _colour(rng)
    whole: list[np.ndarray] = []
    shapes: list[int] = []
    for _ in range(rng.integers(glyphs[0], glyphs[1] + 1)):
        shape = int(rng.integers(len(GLYPHS)))
        mask = _place(rng, x, y, shape, bounds, whole, most_hidden)
        if mask is None:
            continue
        image[:, mask] = _colour(rng)
        whole.append(mask)
        shapes.append(shape)
    image = image + 0.15 * rng.standard_normal(image.shape, dtype=np.float32)
    found = []
    for index, (shape, mask) in enumerate(zip(shapes, whole, strict=True)):
        visible = _visible(mask, whole[index + 1 :])
        found.append(Glyph(shape, visible, 1 - visible.sum() / mask.sum()))
    return to_pixels(image.transpose(1, 2, 0)), found


def _place(
    rng: np.random.Generator,
    x: np.ndarray,
    y: np.ndarray,
    shape: int,
    bounds: tuple[float, float],
    earlier: list[np.ndarray],
    most_hidden: float,
    attempts: int = 20,
) -> np.ndarray | None:
    """The pixels of a glyph that leaves enough of the earlier ones to be seen; None when there is no such place."""
    size = x.shape[0]
    for _ in range(attempts):
        r = rng.uniform(*bounds)
        # 1.3 radii: the corner of a square that is turned. A plus that is turned by 45 degrees would be a saltire.
        cx, cy = rng.uniform(1.3 * r, size - 1 - 1.3 * r, 2)
        mask = _inside(GLYPHS[shape], *_unit_coordinates(x - cx, y - cy, r, rng.uniform(-0.35, 0.35)))
        covers = [*earlier, mask]
        hidden = (1 - _visible(m, covers[i + 1 :]).sum() / m.sum() for i, m in enumerate(earlier))
        if mask.any() and all(share <= most_hidden for share in hidden):
            return mask
    return None


def _visible(mask: np.ndarray, later: list[np.ndarray]) -> np.ndarray:
    return mask & ~np.logical_or.reduce(later) if later else mask
