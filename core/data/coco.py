"""COCO instances for mmdet's detectors, with errors that say what to set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import core.mmcv_ops  # noqa: F401  before mmdet

# isort: split
from mmdet.datasets import CocoDataset

from core.data.errors import DataFileError, MissingDataError
from core.data.errors import data_root as checked_root
from core.data.files import check_records, read_json
from core.registry import DATASETS

_LAYOUT = "annotations/instances_train2017.json, instances_val2017.json\ntrain2017/*, val2017/*"


@DATASETS.register_module()
class CocoInstances(CocoDataset):
    """mmdet's ``CocoDataset``; what is missing on disk, or is not as the config says, is told before anything runs.

    Args:
        data_root: folder with annotations and images.
        ann_file: annotation file below it.
        data_prefix: ``{img: folder of the images below it}``.
        prepare: the command that makes the data, for the message.
        options: of ``mmdet.CocoDataset`` (pipeline, filter_cfg, metainfo, test_mode, ...). Classes are those of
            ``metainfo``, else COCO's 80.

    Raises:
        MissingDataError: no such folder or file; or the annotation file has other classes, or in another order, than
            the config (mmdet would mix them up without a word).
        DataFileError: the annotation file is cut off, is not one of COCO's, or an entry in it is broken.
    """

    builds_its_own = True

    def __init__(
        self,
        data_root: str | None = None,
        ann_file: str = "annotations/instances_train2017.json",
        data_prefix: Mapping[str, str] | None = None,
        prepare: str | None = None,
        **options: Any,
    ) -> None:
        prefix = dict(data_prefix or {"img": "train2017/"})
        root = checked_root(data_root, what="COCO instances", layout=_LAYOUT, key="data_root", prepare=prepare)
        for key, path in (("ann_file", root / ann_file), ("data_prefix.img", root / prefix["img"])):
            if not path.exists():
                made = f"\n  prepare  {prepare}" if prepare else ""
                raise MissingDataError(
                    f"COCO instances: {str(path)!r} is not there; either dataset.data_root or dataset.{key} is wrong. "
                    f"Expected below data_root:\n  {_LAYOUT}".replace("\ntrain2017", "\n  train2017")
                    + made
                )
        super().__init__(data_root=str(root), ann_file=ann_file, data_prefix=prefix, **options)

    def load_data_list(self) -> list[dict]:
        """mmdet's records; see the class for what is checked."""
        loaded: list[Any] = []

        def load(path: str) -> Any:
            loaded.append(type(self).COCOAPI())
            loaded[0].dataset = read_annotations(path)
            loaded[0].createIndex()
            loaded[0].img_ann_map, loaded[0].cat_img_map = loaded[0].imgToAnns, loaded[0].catToImgs
            return loaded[0]

        self.COCOAPI = load
        try:
            records = super().load_data_list()
        finally:
            del self.COCOAPI
        theirs = [loaded[0].cats[number]["name"] for number in self.cat_ids]
        named = self.metainfo["classes"]
        ours = [named] if isinstance(named, str) else list(named)
        if theirs != ours:
            every = [entry["name"] for entry in loaded[0].cats.values()]
            odd = sorted(set(ours) - set(every))
            what = f"does not know {odd[:5]}" if odd else f"has them in another order: {theirs[:5]} ..."
            raise MissingDataError(
                f"{self.ann_file} {what}; dataset.metainfo.classes has to list its categories in its order, "
                f"which are {every[:12]}{' ...' if len(every) > 12 else ''}"
            )
        return records


def read_annotations(path: str | os.PathLike) -> dict[str, Any]:
    """The content of one of COCO's annotation files, with every field that its readers look at.

    Raises:
        MissingDataError: there is no such file.
        DataFileError: it is cut off, not one of COCO's, or an entry lacks a field or refers to what is not there.
    """
    content = read_json(path, keys=("images", "categories"), what="an annotation file of COCO")
    number, name = (int, float), (int, str)
    annotations = content.get("annotations", [])  # the test splits have none
    check_records(path, "images", content["images"], {"id": name, "file_name": str, "height": number, "width": number})
    check_records(path, "categories", content["categories"], {"id": name, "name": str})
    fields = {"id": name, "image_id": name, "category_id": name, "bbox": list, "area": number}
    check_records(path, "annotations", annotations, fields)
    images, categories = ({entry["id"] for entry in content[key]} for key in ("images", "categories"))
    seen: set[Any] = set()
    for place, entry in enumerate(annotations):
        if entry["image_id"] not in images:
            what = f"belongs to image {entry['image_id']!r:.60}, which is not there"
        elif entry["category_id"] not in categories:
            what = f"is of category {entry['category_id']!r:.60}, which is not there"
        elif len(entry["bbox"]) != 4 or not all(isinstance(value, number) for value in entry["bbox"]):
            what = f"has the bbox {entry['bbox']!r:.60}, not four numbers"
        elif entry["id"] in seen:
            what = f"has the id {entry['id']!r:.60} of another one"
        else:
            seen.add(entry["id"])
            continue
        raise DataFileError(f"{os.fspath(path)!r}: annotations[{place}] {what}. Mend the file, or download it again.")
    return content
