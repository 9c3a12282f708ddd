"""mmdet's detectors in the engine: training, exact resume, mixed precision, evaluation, processes, tools, errors."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coding

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import load_weights, model_state
from core.config import compose, to_dict
from core.config.registry import build, check
from core.engine.commands.evaluation import evaluate
from core.engine.commands.inference import infer
from core.engine.detection import Detector, keep_boxes_exact, networks
from core.engine.hooks.ema import batch_size
from core.engine.hooks.finite import NonFiniteLoss
from core.engine.launch import build_trainer, run
from core.errors import ConfigError
from core.profile.experiment import Options, profile_experiment
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["low", "tall"]

EXPERIMENT = """# @package _global_
# A tiny Mask R-CNN on rectangles.
name: mine/boxes
log_every: 1
model:
  type: mmdet.MaskRCNN
  data_preprocessor:
    {type: mmdet.DetDataPreprocessor, mean: [99, 99, 99], std: [60, 60, 60], pad_mask: true, pad_size_divisor: 32}
  backbone:
    type: mmdet.SwinTransformer
    embed_dims: 8
    depths: [1, 1, 1, 1]
    num_heads: [1, 1, 2, 2]
    window_size: 4
    mlp_ratio: 2
    drop_path_rate: 0.1
  neck: {type: mmdet.FPN, in_channels: [8, 16, 32, 64], out_channels: 16, num_outs: 4}
  rpn_head:
    type: mmdet.RPNHead
    in_channels: 16
    feat_channels: 16
    anchor_generator: {type: mmdet.AnchorGenerator, scales: [4], ratios: [0.5, 1, 2], strides: [4, 8, 16, 32]}
    bbox_coder: {type: mmdet.DeltaXYWHBBoxCoder}
    loss_cls: {type: mmdet.CrossEntropyLoss, use_sigmoid: true}
    loss_bbox: {type: mmdet.L1Loss}
  roi_head:
    type: mmdet.StandardRoIHead
    bbox_roi_extractor: &pool
      type: mmdet.SingleRoIExtractor
      roi_layer: {type: RoIAlign, output_size: 7, sampling_ratio: 2}
      out_channels: 16
      featmap_strides: [4, 8]
    bbox_head:
      type: mmdet.Shared2FCBBoxHead
      in_channels: 16
      fc_out_channels: 32
      roi_feat_size: 7
      num_classes: 2
      bbox_coder: {type: mmdet.DeltaXYWHBBoxCoder, target_stds: [0.1, 0.1, 0.2, 0.2]}
      loss_bbox: {type: mmdet.L1Loss}
    mask_roi_extractor: *pool
    mask_head:
      type: mmdet.FCNMaskHead
      num_convs: 1
      in_channels: 16
      conv_out_channels: 16
      num_classes: 2
      loss_mask: {type: mmdet.CrossEntropyLoss, use_mask: true}
  train_cfg:
    rpn:
      assigner: {type: mmdet.MaxIoUAssigner, pos_iou_thr: 0.7, neg_iou_thr: 0.3, min_pos_iou: 0.3}
      sampler: {type: mmdet.RandomSampler, num: 64, pos_fraction: 0.5, add_gt_as_proposals: false}
      allowed_border: 0
      pos_weight: -1
    rpn_proposal: {nms_pre: 64, max_per_img: 16, nms: {type: nms, iou_threshold: 0.7}, min_bbox_size: 0}
    rcnn:
      assigner: {type: mmdet.MaxIoUAssigner, pos_iou_thr: 0.5, neg_iou_thr: 0.5, min_pos_iou: 0.5}
      sampler: {type: mmdet.RandomSampler, num: 16, pos_fraction: 0.5}
      mask_size: 14
      pos_weight: -1
  test_cfg:
    rpn: {nms_pre: 64, max_per_img: 16, nms: {type: nms, iou_threshold: 0.7}, min_bbox_size: 0}
    rcnn: {score_thr: 0.0, nms: {type: nms, iou_threshold: 0.5}, max_per_img: 10, mask_thr_binary: 0.5}
train_dataloader:
  batch_size: 2
  num_workers: 0
  batch_sampler: {type: mmdet.AspectRatioBatchSampler}
  dataset:
    type: core.data.coco.CocoInstances
    data_root: coco
    ann_file: annotations/instances_train2017.json
    data_prefix: {img: train2017/}
    metainfo: {classes: [low, tall]}
    filter_cfg: {filter_empty_gt: true, min_size: 8}
    prepare: python draw.py
    pipeline:
      - {type: mmcv.transforms.LoadImageFromFile}
      - {type: mmdet.LoadAnnotations, with_bbox: true, with_mask: true}
      - {type: mmdet.RandomFlip, prob: 0.5}
      - {type: mmcv.transforms.RandomChoiceResize, scales: [[48, 48], [64, 64]], keep_ratio: true}
      - {type: mmdet.PackDetInputs}
val_dataloader:
  batch_size: 2
  num_workers: 0
  dataset:
    type: core.data.coco.CocoInstances
    data_root: coco
    ann_file: annotations/instances_val2017.json
    data_prefix: {img: val2017/}
    metainfo: {classes: [low, tall]}
    test_mode: true
    pipeline:
      - {type: mmcv.transforms.LoadImageFromFile}
      - {type: mmdet.Resize, scale: [64, 64], keep_ratio: true}
      - {type: mmdet.LoadAnnotations, with_bbox: true, with_mask: true}
      - {type: mmdet.PackDetInputs, meta_keys: [img_id, img_path, ori_shape, img_shape, scale_factor]}
val_evaluator: {type: mmdet.CocoMetric, ann_file: coco/annotations/instances_val2017.json, metric: [bbox, segm]}
train_cfg: {max_steps: 2}
optim_wrapper:
  type: core.OptimWrapper
  optimizer: {type: torch.optim.AdamW, lr: 0.001, weight_decay: 0.05}
  paramwise:
    no_decay: {ndim_max: null, bias: false, norm: false, model: false, names: ["*norm*", "*position_bias_table"]}
param_scheduler: {type: core.Schedule, kind: multi_step, by_epoch: false, warmup: 2, milestones: [9 epochs]}
checkpoint: {every_steps: 1}
"""


def draw(root, split, count, seed):
    """Pictures with one or two rectangles each, in COCO's layout."""
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(1, count + 1):
        height, width = (64, 56) if number % 2 else (56, 64)
        pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for half in range(int(rng.integers(1, 3))):
            tall = int(rng.integers(2))
            w, h = (8, 20) if tall else (20, 8)
            x, y = int(rng.integers(0, 28 - w)) + 28 * half, int(rng.integers(0, 56 - h))
            pixels[y : y + h, x : x + w] = rng.integers(150, 255, 3)
            mask = np.zeros((height, width), np.uint8)
            mask[y : y + h, x : x + w] = 1
            code = coding.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 3 + 4 * tall,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": code["counts"].decode()},
                }
            )
        Image.fromarray(pixels).save(root / f"{split}2017" / f"{number:03d}.png")
        images.append({"id": number, "file_name": f"{number:03d}.png", "height": height, "width": width})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "low"}, {"id": 7, "name": "tall"}],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a data set and an experiment."""
    folder = tmp_path_factory.mktemp("detection")
    draw(folder / "coco", "train", 8, seed=0)
    draw(folder / "coco", "val", 5, seed=1)
    experiments = folder / "configs" / "experiment" / "mine"
    experiments.mkdir(parents=True)
    (experiments / "boxes.yaml").write_text(EXPERIMENT)
    return folder


def cfg(site, *overrides):
    return compose(["experiment=mine/boxes", "runtime=cpu", *overrides], config_dir=site / "configs")


@pytest.fixture
def boxes(site, monkeypatch):
    """Runs the experiment with overrides in its folder."""
    monkeypatch.chdir(site)
    return lambda *overrides: run(cfg(site, *overrides))


@pytest.fixture(scope="module")
def trained(site):
    """One run of three steps that the tests below look at."""
    here = Path.cwd()
    os.chdir(site)
    try:
        result = run(cfg(site, "train_cfg.max_steps=3", "ema={decay: 0.5}"))
    finally:
        os.chdir(here)
    return result


def test_a_run_writes_coco_figures_losses_and_rates(trained, site):
    folder = site / trained["run_dir"]
    assert trained["status"] == "finished" and trained["steps"] == 3
    for kind in ("bbox", "segm"):
        assert 0 <= trained["metrics"][f"coco/{kind}_mAP"] <= 1
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss_mask" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"loss", "loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "acc"} <= steps[0].keys()
    assert [line["lr"] for line in steps] == pytest.approx([0.0, 0.0005, 0.001])


def test_rates_and_averages_count_pictures_not_colour_channels():
    assert batch_size({"inputs": [torch.zeros(3, 8, 8)] * 2, "data_samples": ["a", "b"]}) == 2


def test_decay_follows_the_names(boxes):
    groups = run_groups(boxes)
    spared = {n for g in groups if g["weight_decay"] == 0 for n in g["param_names"]}
    decayed = {n for g in groups if g["weight_decay"] > 0 for n in g["param_names"]}
    assert any("relative_position_bias_table" in n for n in spared) and "backbone.norm0.weight" in spared
    assert "backbone.stages.0.blocks.0.ffn.layers.1.bias" in decayed and "neck.lateral_convs.0.conv.bias" in decayed
    assert all("norm" in n or "relative_position_bias_table" in n for n in spared)


def run_groups(boxes):
    result = boxes("train_cfg.max_steps=1", "val_dataloader=null")
    return torch.load(find_checkpoint(result["run_dir"]), weights_only=True)["optim"]["param_groups"]


def test_resume_gives_the_same_weights(boxes, site, trained):
    folder = site / "resumed"
    first = run(cfg(site, "run_dir=resumed", "train_cfg.max_steps=3", "ema={decay: 0.5}", "checkpoint.keep_last=9"))
    for name in ("step_00000002.pt", "step_00000003.pt"):
        next(iter((folder / "checkpoints").glob(name))).unlink()
    (folder / "result.json").unlink()
    again = run(cfg(site, "resume=resumed", "train_cfg.max_steps=3", "ema={decay: 0.5}", "checkpoint.keep_last=9"))
    assert again["resumed_from"].endswith("step_00000001.pt")
    whole, parts = (model_state(find_checkpoint(r["run_dir"])) for r in (trained, again))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert first["metrics"] == again["metrics"] == trained["metrics"]


def test_a_checkpoint_is_evaluated_with_the_same_figures(trained, site, monkeypatch):
    monkeypatch.chdir(site)
    assert evaluate(cfg(site), trained["run_dir"], split="val") == trained["metrics"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_evaluates(boxes, precision):
    result = boxes(f"runtime.precision={precision}", "train_cfg.max_steps=1")
    assert 0 <= result["metrics"]["coco/segm_mAP"] <= 1


def test_boxes_stay_exact_under_autocast(site):
    model = build_trainer(cfg(site)).network
    seen = []
    model.roi_head.bbox_roi_extractor.roi_layers[0].register_forward_pre_hook(lambda _, i: seen.append(i[1]))
    features = tuple(torch.randn(1, 16, 64 // s, 64 // s, dtype=torch.bfloat16) for s in (4, 8))
    rois = torch.tensor([[0, 1.25, 513.5, 30.0, 547.75]])
    model.roi_head.bbox_roi_extractor(features, rois)
    assert not torch.equal(seen[-1], rois)  # mmdet alone rounds the boxes to bfloat16
    keep_boxes_exact(model)
    out = model.roi_head.bbox_roi_extractor(features, rois)
    assert torch.equal(seen[-1], rois) and out.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        scores, offsets = model.rpn_head((torch.randn(1, 16, 8, 8),))
    assert scores[0].dtype == offsets[0].dtype == torch.float32


def test_initial_weights_come_after_initialisation(boxes, trained, site):
    path = find_checkpoint(site / trained["run_dir"])
    overrides = ("train_cfg.max_steps=1", "optim_wrapper.optimizer.lr=0", "val_dataloader=null")
    result = boxes(*overrides, f"load_from={path}")
    before, after = model_state(path), model_state(find_checkpoint(result["run_dir"]))
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    fresh = model_state(find_checkpoint(boxes(*overrides)["run_dir"]))
    # mmdet's own initialisation was done: normal(0, 0.01) in the RPN, where a Conv2d of 16 channels would draw +-0.08.
    assert 0.005 < fresh["rpn_head.rpn_conv.weight"].std() < 0.015


def test_a_file_of_the_backbone_goes_into_a_detectors_backbone_in_training_and_in_tools(boxes, trained, site, tmp_path):
    whole = model_state(find_checkpoint(site / trained["run_dir"]))
    part = {key.removeprefix("backbone."): value for key, value in whole.items() if key.startswith("backbone.")}
    torch.save(part, tmp_path / "backbone.pt")
    detector = build_trainer(cfg(site))
    said = load_weights(detector, tmp_path / "backbone.pt")
    assert f"into backbone: all {len(part)} keys" in said and "left as built: neck, rpn_head, roi_head" in said
    own = detector.state_dict()
    assert all(torch.equal(own[f"backbone.{key}"], value) for key, value in part.items())
    assert load_weights(detector, tmp_path / "backbone.pt", into="backbone") == said
    frozen = ("train_cfg.max_steps=1", "optim_wrapper.optimizer.lr=0", "val_dataloader=null")
    after = model_state(find_checkpoint(boxes(*frozen, f"load_from={tmp_path}/backbone.pt")["run_dir"]))
    assert all(torch.equal(after[f"backbone.{key}"], value) for key, value in part.items())


@pytest.mark.compile
def test_compiled_parts_are_backbone_and_neck(site, boxes):
    model = build(to_dict(cfg(site))["model"])
    assert set(networks(model)) == {"backbone", "neck"}
    result = boxes("runtime.compile={backend: eager}", "runtime.channels_last=true", "train_cfg.max_steps=1")
    assert not any("_orig_mod" in key for key in model_state(find_checkpoint(result["run_dir"])))


def test_a_loss_that_is_not_finite_names_the_pictures(boxes, site):
    with pytest.raises(NonFiniteLoss, match=r"loss_rpn_cls=nan[\s\S]*train2017/00\d\.png"):
        boxes("run_dir=broken", "model.data_preprocessor.std=[60, 60, nan]")
    state = torch.load(next((site / "broken" / "debug").glob("*.pt")), weights_only=True)
    assert state["batch"]["inputs"][0].dtype == torch.uint8
    assert state["batch"]["data_samples"][0]["gt_instances"]["bboxes"].shape[1] == 4


@pytest.mark.processes
def test_two_processes_train_alike_and_evaluate_every_picture_once(site, trained):
    command = [str(ROOT / "tools" / "train.py"), "--config-dir", "configs", "experiment=mine/boxes", "runtime=cpu"]
    command += [
        "run_dir=two",
        "train_dataloader.batch_size=1",
        "train_cfg.max_steps=1",
        "load_from=" + str(find_checkpoint(site / trained["run_dir"])),
    ]
    command += ["optim_wrapper.optimizer.lr=0", "optim_wrapper.optimizer.weight_decay=0"]
    done = forked.run(command, site, {**os.environ, "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((site / "two" / "result.json").read_text())
    # Five pictures on two processes: shares of three and two; the same weights give the same figures.
    assert result["processes"] == 2 and result["metrics"] == trained["metrics"]
    assert not (site / ".dist_test").exists() and not (site / "two" / ".collect").exists()


def test_infer_draws_boxes_and_lists_them_as_coco_does(trained, site, tmp_path, monkeypatch):
    monkeypatch.chdir(site)
    options = SimpleNamespace(
        checkpoint=trained["run_dir"],
        input="coco/val2017/001.png",
        output=str(tmp_path),
        device="cpu",
        config_dir="configs",
    )
    (record,) = infer(["experiment=mine/boxes"], options)
    assert json.loads((tmp_path / "results.json").read_text()) == [record]
    assert (record["width"], record["height"]) == (56, 64) and 0 < len(record["detections"]) <= 10
    for found in record["detections"]:
        assert found["category_id"] == {"low": 3, "tall": 7}[found["category"]]
        x, y, w, h = found["bbox"]
        assert x >= 0 and y >= 0 and x + w <= 56.01 and y + h <= 64.01
        assert coding.decode(found["segmentation"]).shape == (64, 56)
    with Image.open(record["pictures"]["detections"]) as picture:
        assert picture.size == (7 * 56, 7 * 64) or picture.size == (8 * 56, 8 * 64)


def test_drawing_shows_what_scores_high_and_only_that(site):
    from mmengine.structures import InstanceData

    detector = build_trainer(cfg(site))
    image = np.zeros((64, 64, 3), np.uint8)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:20, 10:30] = masks[1, 40:60, 40:60] = True
    found = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 30, 20], [40, 40, 60, 60]]),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.1]),
        masks=masks,
    )
    picture = detector._draw(image, found, CLASSES)
    factor = len(picture) // 64
    assert picture[15 * factor, 20 * factor].any() and not picture[50 * factor, 50 * factor].any()


@pytest.mark.parametrize("scores", [[0.9, 0.6], [0.6, 0.9]])
def test_where_masks_overlap_the_better_one_is_drawn(site, scores):
    from mmengine.structures import InstanceData

    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:50, 10:40] = masks[1, 10:50, 30:60] = True
    found = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 40, 50], [30, 10, 60, 50]]),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor(scores),
        masks=masks,
    )
    picture = build_trainer(cfg(site))._draw(np.zeros((64, 64, 3), np.uint8), found, CLASSES)
    factor = len(picture) // 64
    left, both, right = (picture[40 * factor, x * factor].tolist() for x in (20, 35, 50))
    assert any(left) and any(right) and left != right
    assert both == (left if scores[0] > scores[1] else right)


def test_the_tools_view_of_a_detector(site):
    view = build_trainer(cfg(site), device="meta")
    assert isinstance(view, Detector) and view.inference_network() is view.network.backbone
    assert view.state_dict().keys() == view.network.state_dict().keys()
    assert view.example_inputs(2, "meta")[0].shape == (2, 3, 64, 64)
    assert view.classes() == CLASSES
    coco = Detector(view.network, {"val_dataloader": {"dataset": {"pipeline": [{"scale": [1333, 800]}]}}})
    assert coco.input_size() == (3, 800, 1280)
    with pytest.raises(ConfigError, match="scale"):
        Detector(view.network, {"val_dataloader": {"dataset": {"pipeline": []}}}).input_size()
    real = build_trainer(cfg(site))
    total, logs = real.parse_losses(real.losses(real.example_batch(2, "cpu")))
    total.backward()
    assert total.isfinite() and "loss_mask" in logs
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in real.network.backbone.parameters())


def test_profile_counts_the_backbone_and_times_the_whole_step(site):
    options = Options(
        "mine/boxes", what=["macs", "train"], batch=1, repeats=1, device="cpu", config_dir=str(site / "configs")
    )
    summary, modules, *_ = profile_experiment(options, [])
    rows = {row.cells["quantity"]: row.cells["mine/boxes:median"] for row in summary.rows}
    backbone = build_trainer(cfg(site), "meta").network.backbone
    assert rows["parameters"] == sum(p.numel() for p in backbone.parameters())
    assert any("stages" in row.cells["module"] for row in modules.rows)
    assert any("training" in quantity or "step" in quantity for quantity in rows)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.type=mmdet.MaskRCN"], "did you mean 'mmdet.MaskRCNN'"),
        (["model.neck.type=FPN"], "did you mean .*'mmdet.FPN'"),
        (["+model.neck.out_chanels=3"], "did you mean 'out_channels'"),
        (["model.train_cfg.rpn.assigner.type=mmdet.MaxIouAssigner"], "did you mean 'mmdet.MaxIoUAssigner'"),
        (["model.roi_head.bbox_roi_extractor.roi_layer.type=RoIAlin"], "registered nowhere"),
        (["train_dataloader.dataset.data_root=nowhere"], r"train_dataloader\.dataset\.data_root[\s\S]*python draw\.py"),
        (["train_dataloader.dataset.ann_file=a.json"], r"'coco/a\.json' is not there; .*dataset\.ann_file"),
        (["train_dataloader.dataset.metainfo.classes=[low, tal]"], r"does not know \['tal'\]"),
        (["train_dataloader.dataset.metainfo.classes=[tall, low]"], "in another order"),
    ],
)
def test_what_cannot_be_meant_is_said(boxes, overrides, message):
    with pytest.raises(Exception, match=message):
        boxes(*overrides)


def test_mmdets_own_pipeline_names_pass_the_check():
    check(
        {
            "type": "mmdet.SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": 7},
            "out_channels": 8,
            "featmap_strides": [4],
        }
    )
    check({"nms": {"type": "nms", "iou_threshold": 0.5}})
