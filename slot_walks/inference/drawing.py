"""Pictures of slots and walks: segments over a picture, soft masks, where a walk from a patch ends, and matrices.

All functions take arrays and give uint8 RGB arrays; nothing here knows networks or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.output.figure import figure_pixels

#: Colours of the first slots, apart in hue and in lightness.
_COLOURS = (
    (230, 60, 50),
    (50, 120, 240),
    (255, 205, 50),
    (40, 180, 90),
    (190, 80, 220),
    (80, 220, 230),
    (245, 120, 20),
    (250, 130, 190),
    (150, 210, 60),
    (130, 85, 50),
    (60, 60, 150),
    (0, 120, 110),
)


class Panel(NamedTuple):
    """One picture of a `sheet`: uint8 `(H, W, 3)`, a line above it, and the colour of its frame (0 to 255)."""

    picture: np.ndarray
    title: str = ""
    edge: Sequence[int] | None = None


# ---------------------------------------------------------------------- colours and sizes
def slot_colours(count: int) -> np.ndarray:
    """Colours `(count, 3)` uint8; the colour of slot k is the same whatever `count`."""
    return np.array([_colour(slot) for slot in range(count)], np.uint8).reshape(count, 3)


@lru_cache(maxsize=256)
def _colour(slot: int) -> tuple[int, ...]:
    if slot < len(_COLOURS):
        return _COLOURS[slot]
    from matplotlib.colors import hsv_to_rgb

    # Of saturated colours the one that is farthest from all earlier ones.
    hues = [(h / 36, s, v) for h in range(36) for s, v in ((1, 1), (1, 0.6), (0.45, 1), (0.5, 0.7))]
    candidates = np.round(255 * hsv_to_rgb(hues)).astype(int)
    earlier = np.array([_colour(other) for other in range(slot)])
    distance = np.abs(candidates[:, None] - earlier[None]).sum(axis=2).min(axis=1)
    return tuple(int(value) for value in candidates[distance.argmax()])


def at_size(picture: np.ndarray, smallest: int = 256, largest: int = 640) -> np.ndarray:
    """A picture `(H, W, 3)` with its longer side between two bounds, for drawing on."""
    height, width = picture.shape[:2]
    factor = min(max(1.0, smallest / max(height, width)), largest / max(height, width))
    if factor == 1:
        return picture
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # Enlarged pixels stay visible, as they are what the model saw.
    return np.asarray(Image.fromarray(picture).resize(size, Image.NEAREST if factor > 1 else Image.LANCZOS))


def enlarge(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values of patches `(h, w)` as blocks of pixels `(H, W)`."""
    rows = np.arange(size[0]) * grid.shape[0] // size[0]
    columns = np.arange(size[1]) * grid.shape[1] // size[1]
    return grid[rows[:, None], columns[None]]


# ---------------------------------------------------------------------- what is drawn on a picture
def paint_segments(
    picture: np.ndarray, segments: np.ndarray, colours: np.ndarray | None = None, plain: int | None = None
) -> np.ndarray:
    """Segments in their colours over a picture, with a line around each.

    Args:
        picture: uint8 `(H, W, 3)`.
        segments: slot or label of every pixel, `(H, W)`.
        colours: `(labels, 3)` uint8; None: those of `slot_colours`.
        plain: a label that gets no colour, such as background; None: all get one.

    Raises:
        ValueError: segments of another size, or more labels than colours.
    """
    if segments.shape != picture.shape[:2]:
        raise ValueError(f"segments of {segments.shape} do not fit a picture of {picture.shape[:2]}")
    colours = slot_colours(int(segments.max()) + 1) if colours is None else colours
    if segments.max() >= len(colours):
        raise ValueError(f"label {segments.max()} has no colour among {len(colours)}")
    grey = picture.astype(np.float32).mean(axis=2, keepdims=True)
    painted = 0.4 * grey + 0.6 * colours[segments]
    if plain is not None:
        painted = np.where((segments == plain)[..., None], 0.7 * grey, painted)
    edge = borders(segments, max(1, round(max(segments.shape) / 200)))
    painted[edge] = 255
    return np.round(painted).astype(np.uint8)


def borders(segments: np.ndarray, width: int = 1) -> np.ndarray:
    """Lines of `width` pixels between different segments, `(H, W)` bool."""
    from scipy.ndimage import maximum_filter, minimum_filter

    return maximum_filter(segments, size=width + 1) != minimum_filter(segments, size=width + 1)


def paint_mask(picture: np.ndarray, mask: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """A picture where a soft mask `(H, W)` in [0, 1] is high, and a dark tint of its slot's colour elsewhere."""
    share = np.clip(mask, 0, 1).astype(np.float32)[..., None]
    ground = 0.22 * np.asarray(colour, np.float32) + 0.08 * picture.astype(np.float32)
    return np.round(share * picture + (1 - share) * ground).astype(np.uint8)


def paint_heat(
    picture: np.ndarray, values: np.ndarray, top: float | None = None, patch: tuple[int, int] | None = None
) -> np.ndarray:
    """Probabilities of patches as a heat map over a grey picture.

    Args:
        picture: uint8 `(H, W, 3)`.
        values: of the patches `(h, w)`, not negative.
        top: value of the brightest colour; None: the largest one.
        patch: `(row, column)` of a patch that is framed.
    """
    from matplotlib import colormaps

    size = picture.shape[:2]
    top = float(values.max()) if top is None else top
    share = enlarge(np.clip(values / max(top, 1e-12), 0, 1), size)[..., None]
    grey = picture.astype(np.float32).mean(axis=2, keepdims=True)
    heat = 255 * colormaps["inferno"](share[..., 0])[..., :3]
    weight = 0.9 * np.sqrt(share)
    painted = np.round(weight * heat + (1 - weight) * 0.5 * grey).astype(np.uint8)
    return painted if patch is None else mark_patch(painted, patch, values.shape)


def mark_patch(picture: np.ndarray, patch: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """A copy of a picture with a frame around the patch `(row, column)` of a grid `(h, w)`.

    Raises:
        ValueError: the patch is not on the grid.
    """
    if not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]):
        raise ValueError(f"patch {tuple(patch)} is not on a grid of {grid[0]} x {grid[1]}")
    height, width = picture.shape[:2]
    marked = picture.copy()
    top, bottom = (round(p * height / grid[0]) for p in (patch[0], patch[0] + 1))
    left, right = (round(p * width / grid[1]) for p in (patch[1], patch[1] + 1))
    line = max(1, round(min(height / grid[0], width / grid[1]) / 6))
    for grow, colour in ((2 * line, 0), (line, 255)):  # white in black is seen on any picture
        frame = np.zeros((height, width), bool)
        frame[max(0, top - grow) : bottom + grow, max(0, left - grow) : right + grow] = True
        frame[top:bottom, left:right] = False
        marked[frame] = colour
    return marked


# ---------------------------------------------------------------------- whole pictures
def soft_masks(picture: np.ndarray, masks: np.ndarray, title: str | None = None) -> np.ndarray:
    """A strip of panels: the picture under the soft mask of each slot, with the share of the picture that it takes.

    Args:
        picture: uint8 `(H, W, 3)`.
        masks: `(K, H, W)` in [0, 1].
        title: above everything.
    """
    panels = [
        Panel(paint_mask(picture, mask, colour), f"slot {slot}: {100 * mask.mean():.0f} %", colour)
        for slot, (mask, colour) in enumerate(zip(masks, slot_colours(len(masks)), strict=True))
    ]
    return sheet(_wrapped(panels, 8), title=title)


def walk_picture(
    picture: np.ndarray,
    walk: np.ndarray,
    target: np.ndarray,
    whole: np.ndarray,
    patch: tuple[int, int],
    title: str | None = None,
) -> np.ndarray:
    """Where a walk from one patch ends, where it should end, and where walks from the slots end.

    Args:
        picture: uint8 `(H, W, 3)`.
        walk: row of P Q of that patch, `(h, w)`: part to whole to part.
        target: its row of the affinity target S, `(h, w)`.
        whole: Q P, `(K, K)`: whole to part to whole.
        patch: `(row, column)`.
        title: above everything.
    """
    top = float(max(walk.max(), target.max()))
    panels = [
        Panel(mark_patch(picture, patch, walk.shape), f"a walk begins at ({patch[0]}, {patch[1]})"),
        Panel(paint_heat(picture, walk, top, patch), f"P-W-P: where it ends (top: {100 * top:.1f} %)"),
        Panel(paint_heat(picture, target, top, patch), "its target: patches alike"),
        Panel(matrix(whole), "W-P-W: from row to column, %"),
    ]
    return sheet(_wrapped(panels, 4), title=title)


def matrix(values: np.ndarray, side: int = 256) -> np.ndarray:
    """A row-stochastic matrix `(K, K)` as a square picture, from row to column, with the slots' colours beside it."""
    count = len(values)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side / 120, side / 120), dpi=120, facecolor="white")
    axes = figure.add_axes((0.11, 0.02, 0.87, 0.87))
    axes.imshow(values, vmin=0, vmax=1, cmap="Greys", extent=(0, count, count, 0))
    if count <= 12:
        for row, column in np.ndindex(count, count):
            value = float(values[row, column])
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=min(12, 50 / count),
                color="white" if value > 0.5 else "black",
            )
    for slot, colour in enumerate(slot_colours(count) / 255):
        axes.add_patch(_square((-0.11 * count / 0.87, slot), 0.09 * count / 0.87, 0.94, colour))
        axes.add_patch(_square((slot, -0.11 * count / 0.87), 0.94, 0.09 * count / 0.87, colour))
    axes.set_axis_off()
    return figure_pixels(figure)


def scenes(columns: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> np.ndarray:
    """Pictures side by side, a column for each scene, with a name for each row.

    Args:
        columns: uint8 pictures of equal size within a column.
        names: of the rows.

    Raises:
        ValueError: a column of another length.
    """
    if any(len(column) != len(names) for column in columns):
        raise ValueError(f"{len(names)} rows are named, columns have {[len(column) for column in columns]}")
    return sheet([[Panel(column[row]) for column in columns] for row in range(len(names))], names, height=192)


def sheet(
    rows: Sequence[Sequence[Panel]], names: Sequence[str] | None = None, title: str | None = None, height: int = 256
) -> np.ndarray:
    """Panels in rows on white, all of one height in pixels, names to the left of the rows.

    Returns:
        uint8 `(H, W, 3)`.
    """
    font, gap = ImageFont.load_default(15), 6
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def width(text: str) -> int:
        return math.ceil(max(draw.textlength(line, font) for line in text.split("\n")))

    left = gap if names is None else max(width(name) for name in names) + 2 * gap
    pictures = [[_of_height(panel.picture, height) for panel in row] for row in rows]
    # A title may be wider than a narrow picture.
    places = [
        [max(picture.width, width(panel.title)) + gap for picture, panel in zip(line, row, strict=True)]
        for line, row in zip(pictures, rows, strict=True)
    ]
    titled = [20 if any(panel.title for panel in row) else 0 for row in rows]
    top = gap if title is None else 26
    whole = max(left + max(sum(line) for line in places), gap + width(title or ""))
    canvas = Image.new("RGB", (whole, top + sum(titled) + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    if title is not None:
        draw.text((gap, 5), title, "black", font)
    y = top
    for number, row in enumerate(rows):
        y += titled[number]
        if names is not None:
            middle = (left - gap, y + height // 2)
            draw.multiline_text(middle, names[number], "black", font, anchor="rm", align="right")
        x = left
        for panel, picture, place in zip(row, pictures[number], places[number], strict=True):
            canvas.paste(picture, (x, y))
            if panel.edge is not None:
                box = (x, y, x + picture.width - 1, y + height - 1)
                draw.rectangle(box, outline=tuple(int(v) for v in panel.edge), width=4)
            draw.text((x, y - 18), panel.title, "black", font)
            x += place
        y += height + gap
    return np.array(canvas)


def _wrapped(panels: Sequence[Panel], most: int, height: int = 256, widest: int = 1600) -> list[Sequence[Panel]]:
    """Panels in rows of equal length that are no wider than `widest` pixels, as far as one panel is not."""
    width = max(height * panel.picture.shape[1] / panel.picture.shape[0] for panel in panels)
    columns = max(1, min(most, int(widest / width), len(panels)))
    columns = -(-len(panels) // -(-len(panels) // columns))
    return [panels[i : i + columns] for i in range(0, len(panels), columns)]


def _of_height(picture: np.ndarray, height: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture))
    size = (max(1, round(image.width * height / image.height)), height)
    # Pixels that are enlarged stay visible.
    return (
        image if image.size == size else image.resize(size, Image.NEAREST if height > image.height else Image.LANCZOS)
    )


def _square(corner: tuple[float, float], width: float, height: float, colour: np.ndarray) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=tuple(colour), edgecolor="none", clip_on=False)
