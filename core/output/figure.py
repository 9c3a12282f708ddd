"""A figure of matplotlib as pixels, and pixels as a PNG file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def figure_pixels(figure: Any) -> np.ndarray:
    """The pixels of a `matplotlib.figure.Figure`, uint8 `(H, W, 3)`; pyplot, which holds global state, is not used."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(pixels: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Writes uint8 `(H, W, 3)` as an optimised PNG file; its folder is made. Returns the file."""
    from PIL import Image

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(target, optimize=True)
    return target
