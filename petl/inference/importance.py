"""Pictures of channel scores: every block's channels in order of place, and what tasks have in common (section 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from petl.models.importance import Scores


def importance_page(scores: Scores, channels: Sequence[Any]) -> Image.Image:
    """A row of bars for every block: a channel's share of the block's score; the chosen ones in colour.

    Args:
        scores: of all blocks.
        channels: what was chosen, as `Scores.select` gives it.
    """
    parts = list(scores.values)
    blocks = len(scores.values[parts[0]])
    figure, axes = _figure(blocks * len(parts), width=9.0, height=0.75)
    for row, axis in enumerate(axes):
        part, block = parts[row // blocks], row % blocks
        value = scores.values[part][block].double().numpy()
        share = 100 * value / max(value.sum(), 1e-300)
        chosen = np.zeros(len(value), dtype=bool)
        chosen[channels[block][part] if part else channels[block]] = True
        places = np.arange(len(value))
        axis.bar(places[~chosen], share[~chosen], width=1.0, color="#b8bec8")
        axis.bar(places[chosen], share[chosen], width=1.0, color="#c2410c")
        axis.set_xlim(-0.5, len(value) - 0.5)
        axis.set_ylabel(f"{part or 'block'} {block}\n%", fontsize=7, rotation=0, ha="right", va="center")
        axis.tick_params(labelsize=6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title(
        f"{scores.origin.get('score', 'scores')} at {scores.site}: each channel's share of its block; coloured: chosen",
        fontsize=9,
    )
    axes[-1].set_xlabel("channel", fontsize=8)
    return _image(figure)


def overlap_page(choices: Mapping[str, Sequence[Any]]) -> Image.Image:
    """How many of their channels two tasks share, as a matrix: the mean over blocks of |A and B| / |A or B|.

    Args:
        choices: channels of every block by task; all of one network.

    Raises:
        ValueError: fewer than two tasks, or networks of different depth.
    """
    names = list(choices)
    if len(names) < 2 or len({len(c) for c in choices.values()}) > 1:
        raise ValueError("an overlap needs the channels of two tasks or more in networks of one depth")
    matrix = np.array([[overlap(choices[a], choices[b]) for b in names] for a in names])
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1.6 + 0.55 * len(names), 1.2 + 0.5 * len(names)), layout="constrained")
    axis.imshow(matrix, vmin=0, vmax=1, cmap="Oranges")
    for i, j in np.ndindex(matrix.shape):
        axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title("chosen channels that two tasks share", fontsize=9)
    return _image(figure)


def overlap(one: Sequence[Any], other: Sequence[Any]) -> float:
    """The mean over blocks of |A and B| / |A or B|; blocks in which neither has a channel are left out."""
    shares = []
    for a, b in zip(one, other, strict=True):
        for first, second in zip(_sets(a), _sets(b), strict=True):
            if first | second:
                shares.append(len(first & second) / len(first | second))
    return float(np.mean(shares)) if shares else 0.0


def _sets(block: Any) -> list[set[int]]:
    return [set(v) for v in block.values()] if isinstance(block, Mapping) else [set(block)]


def _figure(rows: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, 1, figsize=(width, 0.8 + height * rows), layout="constrained", squeeze=False)
    return figure, axes[:, 0]


def _image(figure: Any) -> Image.Image:
    import matplotlib.pyplot as plt

    figure.canvas.draw()
    array = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return Image.fromarray(array)
