"""Every experiment on COCO and on ADE20K takes two steps on small files in the data set's own format."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from core.config import CONFIGS, compose
from core.engine.launch import run

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment" / "stvit").glob("*.yaml"))
# Numbers between 1 and 90 that COCO's file leaves out.
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
BACKBONE = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}


def reduced(backbone):
    """A backbone of the experiment's kind with 8 channels."""
    backbone.update(BACKBONE)
    if backbone.type != "stvit.models.SwinTransformer":
        backbone.update(depths=[1, 1, 6, 1], per_window=2)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Photographs as JPEG with polygons, a crowd in run lengths and 80 categories, numbered as COCO's are."""
    from core.data.coco import CocoInstances

    root, names = tmp_path_factory.mktemp("coco"), CocoInstances.METAINFO["classes"]
    numbers = [number for number in range(1, 91) if number not in UNUSED]
    (root / "annotations").mkdir()
    for split, count in (("train2017", 4), ("val2017", 2)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            corners = [(10, 8), (44, 12), (38, 40), (12, 36)]
            picture = Image.effect_noise((64, 48), 60).convert("RGB")
            ImageDraw.Draw(picture).polygon(corners, fill=(200, 30 * number, 0))
            images.append({"id": 1000 + number, "file_name": f"{number:012d}.jpg", "height": 48, "width": 64})
            picture.save(root / split / images[-1]["file_name"])
            polygon = [float(value) for corner in corners for value in corner]
            shared = {"image_id": 1000 + number, "category_id": numbers[number * 9]}
            whole = {"bbox": [10.0, 8.0, 34.0, 32.0], "area": 900.5, "segmentation": [polygon], "iscrowd": 0}
            runs = {"size": [48, 64], "counts": [48 * 50, 48 * 14]}
            crowd = {"bbox": [50, 0, 14, 48], "area": 672, "segmentation": runs, "iscrowd": 1}
            annotations += [{**shared, **one, "id": 2 * number + i} for i, one in enumerate((whole, crowd))]
        content = {
            "info": {"description": "COCO 2017 Dataset"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"supercategory": "thing", "id": number, "name": name}
                for number, name in zip(numbers, names, strict=True)
            ],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def logged(result):
    lines = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("coco_")])
def test_experiments_on_coco_take_two_steps_on_its_files(name, coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose(
        [
            f"experiment=stvit/{name}",
            "runtime=cpu",
            f"train_dataloader.dataset.data_root={coco}",
            "train_dataloader.num_workers=0",
            "val_dataloader.num_workers=0",
            "train_cfg.max_epochs=null",
            "+train_cfg.max_steps=2",
            "log_every=1",
            "media=null",
        ]
    )
    OmegaConf.set_struct(cfg, False)
    reduced(cfg.model.backbone)
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    cfg.model.rpn_head.update(in_channels=8, feat_channels=8)
    heads = cfg.model.roi_head
    for pool in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        pool.out_channels = 8
    heads.mask_head.update(in_channels=8, conv_out_channels=8)
    for head in [heads.bbox_head] if hasattr(heads.bbox_head, "type") else heads.bbox_head:
        head.update(
            {"in_channels": 8, "fc_out_channels": 16}
            | ({"conv_out_channels": 8} if "conv_out_channels" in head else {})
        )
    cfg.model.train_cfg.rpn_proposal.max_per_img = cfg.model.test_cfg.rpn.max_per_img = 20
    for step in cfg.train_dataloader.dataset.pipeline:
        for choice in step.get("transforms", ()):
            for inner in choice:
                inner.update({"scales": [[64, 64]]} if "scales" in inner else {})
                inner.update({"crop_size": [32, 48]} if "crop_size" in inner else {})
    for step in cfg.val_dataloader.dataset.pipeline:
        step.update({"scale": [64, 64]} if "scale" in step else {})
    cfg.train_dataloader.dataset.filter_cfg.min_size = 32
    result = run(cfg)
    assert result["status"] == "finished" and result["steps"] == 2
    assert len(logged(result)) == 2 and {"coco/bbox_mAP", "coco/segm_mAP"} <= result["metrics"].keys()


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    """Photographs as JPEG and label maps with a palette, as the benchmark's archive holds them."""
    root = tmp_path_factory.mktemp("ade")
    labels = Image.fromarray(np.repeat([0, 1, 2, 150], 24)[None].repeat(72, 0).astype(np.uint8)).convert("P")
    labels.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    for split, kind, count in (("training", "train", 4), ("validation", "val", 2)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for number in range(1, count + 1):
            stem = f"ADE_{kind}_{number:08d}"
            Image.effect_noise((96, 72), 60).convert("RGB").save(root / "images" / split / f"{stem}.jpg")
            labels.save(root / "annotations" / split / f"{stem}.png")
    return root


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("ade20k_")])
def test_experiments_on_ade20k_take_two_steps_on_its_files(name, ade, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose(
        [
            f"experiment=stvit/{name}",
            "runtime=cpu",
            f"train_dataloader.dataset.root={ade}",
            "train_dataloader.num_workers=0",
            "val_dataloader.num_workers=0",
            "train_dataloader.dataset.transform.size=64",
            "val_dataloader.dataset.transform.short=64",
            "model.transform.short=64",
            "train_cfg.max_steps=2",
            "train_cfg.val_every_steps=2",
            "param_scheduler.warmup=1",
            "log_every=1",
            "media=null",
        ]
    )
    OmegaConf.set_struct(cfg, False)
    network = cfg.model.network
    reduced(network.backbone)
    if network.backbone.type != "stvit.models.SwinTransformer":
        network.backbone.key_windows = [8, 12, 6]
    network.head.update(in_channels=[8, 16, 32, 64], channels=8)
    network.auxiliary_head.update(in_channels=32, channels=8)
    result = run(cfg)
    assert result["status"] == "finished" and result["steps"] == 2
    assert len(logged(result)) == 2 and 0 <= result["metrics"]["miou"] <= 1
