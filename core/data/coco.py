"""COCO instances for mmdet's detectors, with errors that say what to set."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmengine.logging import print_log

import core.config.mmcv_ops  # noqa: F401  before mmdet

# isort: split
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric

from core.config.registry import DATASETS
from core.data.errors import data_root as checked_root
from core.data.sources.annotations import read_annotations
from core.data.sources.images import load_image
from core.errors import ConfigError, DataFileError, MissingDataError

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
        pipeline = [_step(step) for step in options.pop("pipeline", ())]
        self._masks = any(_kind(step) == "LoadAnnotations" and step.get("with_mask") for step in pipeline)
        super().__init__(data_root=str(root), ann_file=ann_file, data_prefix=prefix, pipeline=pipeline, **options)

    def load_data_list(self) -> list[dict]:
        """mmdet's records; see the class for what is checked."""
        loaded: list[Any] = []

        def load(path: str) -> Any:
            loaded.append(_indexed(read_annotations(path)))
            return loaded[0]

        self.COCOAPI = load
        self._skipped: Counter[str] = Counter()
        try:
            records = super().load_data_list()
        finally:
            del self.COCOAPI
        self._skipped = +self._skipped
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
        if self._skipped:
            counts = ", ".join(f"{count} {why}" for why, count in self._skipped.items())
            whole = len(loaded[0].dataset["annotations"])
            print_log(f"{self.ann_file}: of {whole} annotations are skipped: {counts}", "current", logging.WARNING)
        return records

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """mmdet's record of an image; what it passes over is counted, and an object without a mask is ignored."""
        record = super().parse_data_info(raw_data_info)
        given = raw_data_info["raw_ann_info"]
        listed = [entry for entry in given if entry["category_id"] in self.cat2label]
        self._skipped["of classes that the config does not list"] += len(given) - len(listed)
        self._skipped["marked ignore"] += (marked := sum(bool(entry.get("ignore")) for entry in listed))
        self._skipped["with a box of no area, or outside its image"] += len(listed) - marked - len(record["instances"])
        for instance in record["instances"] if self._masks else ():
            if "mask" not in instance:
                # mmdet ignores an object whose polygons are no mask, but fails where there is no list of them.
                instance["mask"], instance["ignore_flag"] = [], 1
                self._skipped["without a mask (no polygon of three points or more)"] += 1
        return record

    def filter_data(self) -> list[dict]:
        """What is left of the images.

        Raises:
            MissingDataError: nothing.
        """
        kept = super().filter_data()
        if not self.test_mode and (self.filter_cfg or {}).get("filter_empty_gt"):
            # mmdet looks at all annotations here, also at those that it skips.
            kept = [record for record in kept if any(not one["ignore_flag"] for one in record["instances"])]
        if not kept:
            rule = f" with filter_cfg={dict(self.filter_cfg)}" if self.filter_cfg and not self.test_mode else ""
            counts = "".join(f"; {count} annotations are {why}" for why, count in self._skipped.items())
            raise MissingDataError(
                f"{self.ann_file}: none of {len(self.data_list)} images is left{rule}{counts}. Check the file, "
                "dataset.metainfo.classes and dataset.filter_cfg"
            )
        return kept

    def describe(self, index: int) -> str:
        """The file of a sample."""
        return self.get_data_info(index)["img_path"]


class InstanceImage:
    """The step of a pipeline that `LoadImageFromFile` stands for: mmdet's, by this project's reader of images.

    As with mmdet and detectron2 an image stands upright as its Exif orientation says, unless the annotation file has
    the size of the image as it is stored.
    """

    def __init__(self, to_float32: bool = False) -> None:
        self.to_float32 = to_float32

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds `img` `(H, W, 3)` BGR, `img_shape` and `ori_shape`.

        Raises:
            MissingDataError, DataFileError: see `load_image`; or the annotation file says another size.
        """
        path, size = results["img_path"], (results["width"], results["height"])
        image = load_image(path, size=size)
        if image.size != size:
            raise DataFileError(
                f"{path!r} is {image.width} x {image.height}, image {results['img_id']!r} of the annotation file "
                f"{size[0]} x {size[1]}: its boxes belong to another size of the image. Mend width and height there"
            )
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        results["img"] = pixels.astype(np.float32) if self.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


class CocoFigures(CocoMetric):
    """mmdet's `CocoMetric` on annotation files as they are; evaluators take it for `mmdet.CocoMetric`.

    Ids may be names, and 0 is one like others (pycocotools takes an object of id 0 for a missed one). An object without
    a mask is ignored where masks are compared. A model that finds nothing has figures of 0, not none.

    Args:
        ann_file: the annotation file; None: mmdet takes the objects from the samples.
        options: of `mmdet.CocoMetric`.

    Raises:
        MissingDataError, DataFileError: see `core.data.sources.annotations.read_annotations`.
        ConfigError: the file has no annotations to compare with.
    """

    builds_its_own = True
    partial = False  # the engine says so of a limited evaluation: images that it has not read are no misses

    def __init__(self, ann_file: str | None = None, **options: Any) -> None:
        super().__init__(ann_file=None, **options)
        if ann_file is None:
            return
        content = read_annotations(ann_file)
        if not content["annotations"] and not self.format_only:
            raise ConfigError(
                f"{ann_file} has no annotations to evaluate with (as the test splits of COCO); set "
                "format_only=true and outfile_prefix=PATH to write results for its server"
            )
        for number, entry in enumerate(content["annotations"], start=1):
            entry["id"] = number
        self._coco_api = _indexed(content, _Judged)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """See mmdet's."""
        self.img_ids = sorted({truth["img_id"] for truth, _ in results}) if self.partial else None
        return super().compute_metrics(results)


class _Judged(COCO):
    """Objects for one evaluation after another."""

    def loadAnns(self, ids: Any = ()) -> list[dict]:
        """Copies: an evaluation writes into them."""
        return [dict(entry) for entry in super().loadAnns(ids)]

    def loadRes(self, found: list[dict]) -> COCO:
        """Detections; without any, as of a model that has hardly begun, all objects are missed (pycocotools fails)."""
        return super().loadRes(found) if found else _indexed({**self.dataset, "annotations": []})

    def annToRLE(self, ann: dict) -> dict:
        """Run lengths of an object's mask; one without a mask becomes a crowd of no pixels, so that it is ignored."""
        if not ann["segmentation"]:
            image = self.imgs[ann["image_id"]]
            ann["iscrowd"] = 1
            ann["segmentation"] = {
                "size": [image["height"], image["width"]],
                "counts": [image["height"] * image["width"]],
            }
        return super().annToRLE(ann)


def _indexed(content: dict[str, Any], kind: type[COCO] = COCO) -> COCO:
    found = kind()
    found.dataset = content
    found.createIndex()
    found.img_ann_map, found.cat_img_map = found.imgToAnns, found.catToImgs
    return found


def _kind(step: Any) -> str:
    return str(step.get("type")).rpartition(".")[2] if isinstance(step, Mapping) else ""


def _step(step: Any) -> Any:
    """A step of a pipeline; one that reads images by mmcv's defaults reads them by ours."""
    if _kind(step) == "LoadImageFromFile" and set(step) <= {"type", "to_float32"}:
        return InstanceImage(**{key: value for key, value in step.items() if key != "type"})
    return step
