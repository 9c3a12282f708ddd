"""COCO's files as users have them: what mmdet and detectron2 skip is skipped and counted, all else is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coding

from core.data import DataFileError, MissingDataError
from core.data.coco import CocoFigures, CocoInstances
from core.data.sources.annotations import decode
from core.errors import ConfigError
from core.metrics.evaluators import build_evaluator

SQUARE = [[2, 2, 6, 2, 6, 6, 2, 6]]
STEPS = [
    {"type": "mmcv.transforms.LoadImageFromFile"},
    {"type": "mmdet.LoadAnnotations", "with_bbox": True, "with_mask": True},
    {"type": "mmdet.PackDetInputs", "meta_keys": ["img_id", "ori_shape"]},
]
BOXES = [STEPS[0], {"type": "mmdet.LoadAnnotations", "with_bbox": True}, STEPS[2]]


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr("core.data.coco.print_log", lambda text, logger, level: lines.append(text))
    return lines


def entry(number, image=1, category=7, **changes):
    box = {"bbox": [2, 2, 4, 4], "area": 16, "iscrowd": 0, "segmentation": SQUARE}
    return {"id": number, "image_id": image, "category_id": category, **box, **changes}


def content(*annotations, images=(1,), **changes):
    pictures = [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 12} for i in images]
    names = [{"id": 7, "name": "disc"}, {"id": 9, "name": "ring"}]
    return {"images": pictures, "categories": names, "annotations": list(annotations), **changes}


def write(root, data, split="train"):
    for name in ("annotations", f"{split}2017"):
        (root / name).mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(data))
    for one in data["images"]:
        Image.new("RGB", (12, 8), (10, 20, 30)).save(root / f"{split}2017" / one["file_name"])
    return root


def instances(root, pipeline=STEPS, **options):
    from mmengine.registry import DefaultScope

    options = {"metainfo": {"classes": ("disc", "ring")}, **options}
    with DefaultScope.overwrite_default_scope("mmdet"):
        return CocoInstances(str(root), pipeline=pipeline, **options)


BAD = [
    entry(2, segmentation=[]),
    entry(3, segmentation=[[2, 2, 6, 6]]),
    {key: value for key, value in entry(4).items() if key != "segmentation"},
    entry(5, segmentation=None),
    entry(6, segmentation={"size": [8, 12]}),
    entry(7, segmentation=[[2, 2, 6, 2, 6, 6, 2]]),
]
GONE = [
    entry(8, bbox=[2, 2, 0, 4]),
    entry(9, bbox=[40, 2, 4, 4]),
    entry(10, area=0),
    entry(11, ignore=1),
]
RUNS = {"size": [8, 12], "counts": [16, 8, 72]}
MASK = np.zeros((8, 12), bool)
MASK[:, 2] = True


def test_what_mmdet_skips_is_skipped_and_counted_once(tmp_path, log):
    packed = coding.encode(np.asfortranarray(MASK.astype(np.uint8)))
    compressed = {"size": [8, 12], "counts": packed["counts"].decode()}
    good = [entry(1), entry(12, segmentation=RUNS), entry(13, segmentation=compressed), entry(14, category=9)]
    good.append(entry(15, iscrowd=1, segmentation=RUNS))
    good.append(entry(16, segmentation=[[1, 1, 2, 2], *SQUARE]))
    data = instances(write(tmp_path, content(*good, *BAD, *GONE)), metainfo={"classes": ("disc",)})
    (line,) = log
    assert "instances_train2017.json: of 16 annotations are skipped: 1 of classes that the config does not list" in line
    assert "1 marked ignore, 3 with a box of no area" in line and f"{len(BAD)} without a mask" in line
    sample = data[0]["data_samples"]
    masks = sample.gt_instances.masks.masks.astype(bool)
    assert len(masks) == 4 and np.array_equal(masks[1], MASK) and np.array_equal(masks[2], MASK)
    assert np.array_equal(masks[0], decode(SQUARE, 8, 12)) and np.array_equal(masks[3], masks[0])
    assert len(sample.ignored_instances) == 1 + len(BAD) and data.describe(0).endswith("train2017/1.png")
    log.clear()
    boxes = instances(tmp_path, BOXES, metainfo={"classes": ("disc",)})[0]["data_samples"]
    assert len(boxes.gt_instances) == 4 + len(BAD) and "without a mask" not in log[0]


def test_a_sound_file_says_nothing(tmp_path, log):
    assert len(instances(write(tmp_path, content(entry(1))))) == 1 and not log


def test_names_as_ids(tmp_path):
    data = content(entry("a", "x"), images=("x",))
    assert instances(write(tmp_path, data))[0]["data_samples"].img_id == "x"


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (entry(5, image=3), r"annotations\[0\] belongs to image 3, .*\(annotation 5 of image 3\)"),
        (entry(5, category=3), r"annotations\[0\] is of category 3, .*\(annotation 5 of image 1\)"),
        (entry(5, bbox=[1, 2, float("nan"), 4]), r"annotations\[0\] has the bbox .*\(annotation 5 of image 1\)"),
        (entry(5, bbox=None), r"bbox of annotations\[0\] is None \(annotation 5 of image 1\)"),
        (entry(5, segmentation="runs"), r".*a segmentation that is a str.*\(annotation 5 of image 1\)"),
        (entry(5, segmentation=[2, 2, 6, 2, 6, 6]), r".*not a list of polygons \(annotation 5 of image 1\)"),
        (
            entry(5, segmentation={**RUNS, "size": [9, 12]}),
            r".*run lengths of \[9, 12\], its image \[8, 12\] \(annotation 5",
        ),
        (
            entry(5, segmentation={**RUNS, "counts": [16, 8]}),
            r".*run lengths of 24 pixels .*\(annotation 5 of image 1\)",
        ),
    ],
)
def test_what_no_reader_can_pass_over_is_named_with_image_and_annotation(tmp_path, broken, what):
    with pytest.raises(DataFileError, match=rf"instances_train2017\.json': {what}"):
        instances(write(tmp_path, content(broken)))


def test_ids_that_are_there_twice_are_named(tmp_path):
    for data, what in (
        (content(images=(1, 1)), r"images\[1\] has the id 1 of another one"),
        (content(entry(1), entry(1)), r"annotations\[1\] has the id 1 of another one \(annotation 1 of image 1"),
        (content(categories=[{"id": 7, "name": "disc"}, {"id": 7, "name": "ring"}]), r"categories\[1\] has the id 7"),
    ):
        with pytest.raises(DataFileError, match=what):
            instances(write(tmp_path, data))


@pytest.mark.parametrize(
    ("data", "options", "what"),
    [
        (content(), {"filter_cfg": {"filter_empty_gt": True}}, r"none of 1 images is left with filter_cfg="),
        (content(entry(1)), {"filter_cfg": {"min_size": 32}}, r"none of 1 images .*'min_size': 32"),
        (content(*GONE), {"filter_cfg": {"filter_empty_gt": True}}, r"none of 1 .*; 3 annotations are with a box"),
        (content(*BAD), {"filter_cfg": {"filter_empty_gt": True}}, r"none of 1 .*; 6 annotations are without a mask"),
        (content(entry(1, category=9)), {"filter_cfg": {"filter_empty_gt": True}, "metainfo": {"classes": ("disc",)}},
         r"none of 1 .*; 1 annotations are of classes that the config does not list"),
        (content(images=()), {}, "none of 0 images is left"),
        (content(images=()), {"test_mode": True}, "none of 0 images is left"),
    ],
)  # fmt: skip
def test_nothing_left_is_an_error_with_the_reasons(tmp_path, data, options, what, log):
    with pytest.raises(MissingDataError, match=what):
        instances(write(tmp_path, data), **options)


def test_images_without_a_usable_object_are_filtered(tmp_path, log):
    data = content(entry(1), *[{**one, "image_id": 2} for one in BAD], images=(1, 2, 3))
    kept = instances(write(tmp_path, data), filter_cfg={"filter_empty_gt": True})
    assert [kept.get_data_info(i)["img_id"] for i in range(len(kept))] == [1]
    assert len(instances(tmp_path)) == 3


@pytest.mark.parametrize("missing", ["key", "null"])
def test_files_of_test_splits_give_images(tmp_path, missing):
    data = content(annotations=None)
    if missing == "key":
        del data["annotations"]
    root = write(tmp_path, data)
    sample = instances(root, test_mode=True)[0]
    assert sample["inputs"].shape == (3, 8, 12) and len(sample["data_samples"].gt_instances) == 0
    path = f"{root}/annotations/instances_train2017.json"
    with pytest.raises(ConfigError, match=r"has no annotations to evaluate with .*format_only=true"):
        CocoFigures(ann_file=path, metric="bbox")
    CocoFigures(ann_file=path, metric="bbox", format_only=True, outfile_prefix=str(root / "out"))


# ---------------------------------------------------------------------- images
def test_images_of_every_kind_are_read_by_the_one_reader(tmp_path):
    file = write(tmp_path, content(entry(1))) / "train2017" / "1.png"
    deep = np.full((8, 12), 20000, np.uint16)
    palette = Image.fromarray(np.full((8, 12), 5, np.uint8)).convert("P")
    palette.putpalette([0] * 15 + [1, 2, 3])
    for image, kind, bgr in ((Image.fromarray(deep), "PNG", (78, 78, 78)), (palette, "GIF", (3, 2, 1))):
        image.save(file, kind)
        assert instances(tmp_path)[0]["inputs"][:, 0, 0].tolist() == list(bgr)
    Image.effect_noise((12, 8), 90).save(file, "JPEG", quality=100)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataFileError, match=r"1\.png"):
        instances(tmp_path)[0]
    file.unlink()
    with pytest.raises(MissingDataError, match=r"1\.png"):
        instances(tmp_path)[0]
    theirs = [{**STEPS[0], "imdecode_backend": "pillow"}, *STEPS[1:]]  # what is asked for otherwise stays mmdet's
    Image.new("RGB", (12, 8), (9, 8, 7)).save(file)
    assert instances(tmp_path, theirs)[0]["inputs"][:, 0, 0].tolist() == [7, 8, 9]


def test_boxes_and_turned_images_agree(tmp_path):
    """mmdet and detectron2 turn images; an annotation file with the size of the stored pixels refers to these."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, :4] = 200
    exif = Image.Exif()
    exif[274] = 6
    stored = content(entry(1))
    file = write(tmp_path, stored) / "train2017" / "1.png"
    Image.fromarray(pixels).save(file, exif=exif)
    assert np.array_equal(instances(tmp_path)[0]["inputs"].permute(1, 2, 0), pixels)
    turned = content(entry(1))
    turned["images"][0].update(height=12, width=8)
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(turned))
    sample = instances(tmp_path)[0]
    assert np.array_equal(sample["inputs"].permute(1, 2, 0), np.rot90(pixels, -1))
    assert sample["data_samples"].ori_shape == (12, 8) == sample["data_samples"].gt_instances.masks.masks.shape[1:]
    turned["images"][0].update(height=16, width=24)
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(turned))
    with pytest.raises(DataFileError, match=r"1\.png' is 8 x 12, image 1 of the annotation file 24 x 16"):
        instances(tmp_path)[0]


# ---------------------------------------------------------------------- figures
def figures(root, found, metric=("bbox", "segm"), partial=False):
    """The metric's figures where `found` are the boxes of image 1, all with the square's mask."""
    (judge,) = build_evaluator(
        {"type": "mmdet.CocoMetric", "ann_file": f"{root}/annotations/instances_train2017.json", "metric": list(metric)}
    ).metrics
    judge.dataset_meta, judge.partial = {"classes": ("disc", "ring")}, partial
    count = len(found)
    masks = torch.from_numpy(decode(SQUARE, 8, 12))[None].repeat(count, 1, 1)
    prediction = {
        "bboxes": torch.as_tensor(found).float(),
        "scores": torch.ones(count),
        "labels": torch.zeros(count).long(),
    }
    judge.process({}, [{"pred_instances": {**prediction, "masks": masks}, "img_id": judge._coco_api.getImgIds()[0],
                        "ori_shape": (8, 12)}])  # fmt: skip
    first = judge.evaluate(1)
    judge.process({}, [{"pred_instances": {**prediction, "masks": masks}, "img_id": judge._coco_api.getImgIds()[0],
                        "ori_shape": (8, 12)}])  # fmt: skip
    assert judge.evaluate(1) == first  # one evaluation changes nothing for the next
    return first


@pytest.mark.parametrize("names", [(0, 1), (3, 1), ("b", "a")])
def test_an_object_that_is_found_counts_whatever_its_id(tmp_path, names):
    number, image = names
    write(tmp_path, content(entry(number, image), images=(image,)))
    assert figures(tmp_path, [[2, 2, 6, 6]])["coco/bbox_mAP"] == 1
    assert figures(tmp_path, [[2, 2, 6, 6]])["coco/segm_mAP"] == 1


def test_objects_without_a_mask_are_ignored_where_masks_are_compared(tmp_path):
    for broken in BAD:
        write(tmp_path, content(entry(1), {**broken, "bbox": [8, 2, 3, 3]}))
        found = figures(tmp_path, [[2, 2, 6, 6]])
        assert found["coco/segm_mAP"] == 1 and 0.4 < found["coco/bbox_mAP"] < 0.6


def test_a_model_that_finds_nothing_has_figures_of_0(tmp_path):
    write(tmp_path, content(entry(1)))
    found = figures(tmp_path, torch.zeros(0, 4))
    assert found["coco/bbox_mAP"] == found["coco/segm_mAP"] == 0


def test_images_that_a_limited_evaluation_has_not_read_are_no_misses(tmp_path):
    write(tmp_path, content(entry(1), entry(2, 2), images=(1, 2)))
    assert figures(tmp_path, [[2, 2, 6, 6]], partial=True)["coco/bbox_mAP"] == 1
    assert 0.4 < figures(tmp_path, [[2, 2, 6, 6]])["coco/bbox_mAP"] < 0.6


def test_a_list_of_metrics_takes_the_same_reader(tmp_path):
    path = f"{write(tmp_path, content(entry(1)))}/annotations/instances_train2017.json"
    one = {"type": "mmdet.CocoMetric", "ann_file": path}
    for config in (
        one,
        [one],
        {"metrics": [one]},
        {"metrics": one},
        {"type": "mmengine.evaluator.Evaluator", "metrics": [one]},
    ):
        assert type(build_evaluator(config).metrics[0]) is CocoFigures


# ---------------------------------------------------------------------- decoding
def test_polygons_of_two_points_are_no_box():
    """pycocotools takes four numbers for a box."""
    assert np.array_equal(decode([*SQUARE, [0, 0, 8, 8]], 8, 12), decode(SQUARE, 8, 12))
    with pytest.raises(ValueError, match="polygons or run lengths"):
        decode([[0, 0, 8, 8]], 8, 12)
    with pytest.raises(ValueError, match="do not belong to"):
        decode(RUNS, 12, 8)
