"""COCO's annotation files as users have them: what is broken is named with image and annotation."""

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from core.config.files import check_records, read_json
from core.errors import DataFileError

_NUMBER, _NAME = (int, float), (int, str)
_WHAT = "an annotation file of COCO"
_REMEDY = "Mend the file, or download it again."


def read_annotations(path: str | os.PathLike, need: Literal["images", "masks", "boxes"] = "boxes") -> dict[str, Any]:
    """The content of one of COCO's annotation files; without annotations, as those of the test splits, an empty list.

    A segmentation that is no mask (missing, empty, polygons of less than three points, run lengths without `counts` or
    `size`) becomes an empty list; of several polygons the sound ones stay. mmdet and detectron2 pass over the same.

    Args:
        path: the file.
        need: "images" looks at no annotation, "masks" at what masks of images need, "boxes" at all that mmdet reads.

    Raises:
        MissingDataError: there is no such file.
        DataFileError: it is cut off, not one of COCO's, an id is there twice, or an entry lacks a field or refers to
            what is not there; annotations are named by place, id and image.
    """
    content, boxes = read_json(path, what=_WHAT), need == "boxes"
    if "images" not in content or "categories" not in content:
        read_json(path, keys=("images", *(() if boxes else ("annotations",)), "categories"), what=_WHAT)
    content["annotations"] = content.get("annotations") or []
    size = {"height": _NUMBER, "width": _NUMBER} if boxes else {}
    check_records(path, "images", content["images"], {"id": _NAME, "file_name": str, **size})
    if need == "images":
        return content
    check_records(path, "categories", content["categories"], {"id": _NAME} | ({"name": str} if boxes else {}))
    fields = {"image_id": _NAME, "category_id": _NAME} | ({"id": _NAME, "bbox": list, "area": _NUMBER} if boxes else {})
    check_records(path, "annotations", content["annotations"], fields, _called)
    images, categories = (_by_id(path, key, content[key]) for key in ("images", "categories"))
    _by_id(path, "annotations", [e for e in content["annotations"] if isinstance(e.get("id"), _NAME)], _called)
    for place, entry in enumerate(content["annotations"]):
        if (what := _fault(entry, images, categories)) is not None:
            raise DataFileError(f"{os.fspath(path)!r}: annotations[{place}] {what} ({_called(entry)}). {_REMEDY}")
        entry["segmentation"] = _sound(entry.get("segmentation"))
    return content


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons or run lengths as pixels, `(height, width)` bool.

    Raises:
        ValueError: it is neither, or of another size.
    """
    from pycocotools import mask as coding

    if isinstance(segmentation, Mapping):
        runs = segmentation
        if list(runs["size"]) != [height, width]:
            raise ValueError(f"run lengths of {runs['size']} do not belong to a picture of {[height, width]}")
        if isinstance(runs["counts"], list):
            runs = coding.frPyObjects(runs, height, width)
    elif isinstance(segmentation, list) and (polygons := _sound(segmentation)):
        runs = coding.merge(coding.frPyObjects(polygons, height, width))
    else:
        raise ValueError(f"a segmentation is polygons or run lengths, not {segmentation!r:.60}")
    return coding.decode(runs).astype(bool)


def _called(entry: Mapping[str, Any]) -> str:
    return f"annotation {entry.get('id')!r:.60} of image {entry.get('image_id')!r:.60}"


def _by_id(path: str | os.PathLike, key: str, entries: list[dict], called: Any = None) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        if entry["id"] in found:
            what = f"{key}[{place}] has the id {entry['id']!r:.60} of another one"
            what += f" ({called(entry)} and {called(found[entry['id']])})" if called else ""
            raise DataFileError(f"{os.fspath(path)!r}: {what}. {_REMEDY}")
        found[entry["id"]] = entry
    return found


def _fault(entry: Mapping[str, Any], images: Mapping, categories: Mapping) -> str | None:
    """What is wrong with an annotation that no reader could pass over without a word."""
    if entry["image_id"] not in images:
        return f"belongs to image {entry['image_id']!r:.60}, which is not there"
    if entry["category_id"] not in categories:
        return f"is of category {entry['category_id']!r:.60}, which is not there"
    box, form = entry.get("bbox"), entry.get("segmentation")
    if "bbox" in entry and not (isinstance(box, list) and len(box) == 4 and _numbers(box)):
        return f"has the bbox {box!r:.60}, not four numbers"
    if form is not None and not isinstance(form, list | dict):
        return f"has a segmentation that is a {type(form).__name__}, neither polygons nor run lengths"
    if isinstance(form, list) and any(not isinstance(polygon, list) for polygon in form):
        return f"has the segmentation {form!r:.60}, not a list of polygons"
    if isinstance(form, dict) and _sound(form):
        size = [images[entry["image_id"]].get(side) for side in ("height", "width")]
        if None not in size and list(form["size"]) != size:
            return f"has run lengths of {form['size']!r:.60}, its image {size}"
        if isinstance(form["counts"], list) and sum(form["counts"]) != math.prod(form["size"]):
            return f"has run lengths of {sum(form['counts'])} pixels for a mask of {form['size']}"
    return None


def _numbers(values: list) -> bool:
    try:
        return all(map(math.isfinite, values))
    except TypeError:
        return False


def _sound(segmentation: Any) -> Any:
    """A segmentation without polygons of less than three points; an empty list where nothing of it is a mask."""
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        whole = isinstance(size, list) and len(size) == 2 and isinstance(segmentation.get("counts"), list | str)
        return segmentation if whole else []
    return [one for one in segmentation or [] if len(one) >= 6 and len(one) % 2 == 0 and _numbers(one)]
