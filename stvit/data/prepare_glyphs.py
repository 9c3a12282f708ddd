"""The preparation task that writes pictures of GlyphField with their masks, for trying a trained model on files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from core.config.files import replacing
from core.data.prepare import preparer
from core.errors import ConfigError
from core.output.progress import Progress
from stvit.standin.glyphs import GlyphField, to_pixels


@preparer("glyph_pictures")
def glyph_pictures(
    root: Path, count: int = 16, split: str = "test", size: int = 28, glyphs: int = 1, clutter: int = 0, seed: int = 0
) -> str:
    """Pictures with one of eight shapes and the shape's mask, to try segmentation on files.

    root/images/<number>.png and root/masks/<number>.png, 0 for background and 1 to 8 for the shapes: the images of
    stvit.GlyphField. Files that are there are written again, with the same content for the same settings.

    Args:
        root: folder that is written to.
        count: pictures.
        split: of stvit.GlyphField: train, val or test.
        size: side of the pictures in pixels.
        glyphs: shapes in a picture.
        clutter: strokes behind them.
        seed: of all pictures.

    Raises:
        ConfigError: no picture, or settings that stvit.GlyphField refuses.
    """
    from PIL import Image

    if count < 1:
        raise ConfigError("glyph_pictures: count is at least 1")
    try:
        field = GlyphField(split, size=size, count=count, glyphs=glyphs, clutter=clutter, seed=seed, mask=True)
    except ValueError as error:
        raise ConfigError(f"glyph_pictures: {error}") from None
    for folder in (root / "images", root / "masks"):
        folder.mkdir(parents=True, exist_ok=True)
    for index in Progress().over(range(count), "pictures"):
        sample = field[index]
        pixels = to_pixels(sample["image"].permute(1, 2, 0).numpy())
        for kind, array in (("images", pixels), ("masks", sample["mask"].numpy().astype(np.uint8))):
            with replacing(root / kind / f"{index:06d}.png") as file:
                Image.fromarray(array).save(file, format="png")
    return f"{root / 'images'}: {count} pictures, {root / 'masks'}: their masks"
