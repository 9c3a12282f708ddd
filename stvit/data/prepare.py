"""Preparation tasks of STViT: data sets that are rendered instead of downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from core.config.files import read_json, replacing
from core.data.prepare import preparer
from core.errors import ConfigError
from core.output.progress import Progress
from stvit.data.prepare_clips import moving_glyphs
from stvit.data.prepare_glyphs import glyph_pictures
from stvit.standin.glyphs import GLYPHS
from stvit.standin.scenes import Glyph, render_scene

__all__ = ["glyph_coco", "glyph_pictures", "moving_glyphs"]

# Streams of random numbers, apart from those of stvit.standin.glyphs.GlyphField.
_STREAMS = {"train": 1000, "val": 1001}


@preparer("glyph_coco")
def glyph_coco(
    root: Path, train: int = 2000, val: int = 400, size: int = 128, most: int = 5, clutter: int = 8, seed: int = 0
) -> str:
    """Rendered objects with boxes and masks in COCO's layout, for trying detectors within minutes.

    Eight shapes, several to a picture, partly hidden by each other, on gratings with strokes as clutter:
    root/annotations/instances_{train,val}2017.json and root/{train,val}2017/*.png. A picture is a function of seed,
    split and its number alone. What is there already with the same settings is left alone.

    Args:
        root: the data set's root.
        train: pictures in train2017.
        val: pictures in val2017.
        size: side of the pictures in pixels.
        most: largest number of objects in a picture; the smallest is 1.
        clutter: strokes in a picture.
        seed: of all pictures.

    Raises:
        ConfigError: a number below 1, or a root that holds another data set.
    """
    if min(train, val, most) < 1 or size < 32 or clutter < 0:
        raise ConfigError("glyph_coco: train, val and most are at least 1, size is at least 32, clutter at least 0")
    lines = []
    for split, count in (("train", train), ("val", val)):
        settings = {"split": split, "count": count, "size": size, "most": most, "clutter": clutter, "seed": seed}
        annotations = root / "annotations" / f"instances_{split}2017.json"
        if _is_there(annotations, settings, root / f"{split}2017"):
            lines.append(f"{annotations}: already there")
            continue
        content = _render(root / f"{split}2017", settings)
        with replacing(annotations) as file:
            file.write(json.dumps(content).encode())
        lines.append(f"{annotations}: {count} pictures, {len(content['annotations'])} objects")
    return "\n".join(lines)


def _is_there(annotations: Path, settings: dict[str, Any], images: Path) -> bool:
    if not annotations.is_file():
        return False
    content = read_json(annotations)
    if "glyph_coco" not in content.get("info", {}):
        raise ConfigError(f"{annotations} belongs to another data set: give an empty root=")
    whole = all((images / entry["file_name"]).is_file() for entry in content["images"])
    return whole and content["info"]["glyph_coco"] == settings


def _render(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes the pictures of a split and returns its annotation file."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    size = settings["size"]
    images, annotations = [], []
    for number in Progress().over(range(1, settings["count"] + 1), f"{settings['split']} pictures"):
        rng = np.random.default_rng([settings["seed"], _STREAMS[settings["split"]], number])
        pixels, glyphs = render_scene(rng, size, glyphs=(1, settings["most"]), clutter=settings["clutter"])
        name = f"{number:012d}.png"
        with replacing(folder / name) as file:
            Image.fromarray(pixels).save(file, format="png")
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        for glyph in glyphs:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(glyph)})
    return {
        "info": {"description": "rendered glyphs", "glyph_coco": settings},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": name, "supercategory": "glyph"} for n, name in enumerate(GLYPHS, start=1)],
    }


def _annotation(glyph: Glyph) -> dict[str, Any]:
    """COCO's entry of an object. Run lengths instead of polygons: rings have holes, hidden objects fall into parts."""
    from pycocotools import mask as coding

    encoded = coding.encode(np.asfortranarray(glyph.mask.astype(np.uint8)))
    return {
        "category_id": glyph.shape + 1,
        "bbox": coding.toBbox(encoded).tolist(),
        "area": float(coding.area(encoded)),
        "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode()},
        "iscrowd": 0,
    }
