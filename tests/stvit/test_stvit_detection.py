"""STViT in mmdet's detectors: the paper's configs, data in COCO's format, a run, the backbone in mmdet's own runner."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader
from PIL import Image
from pycocotools import mask as coding
from pycocotools.coco import COCO

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import compose, to_dict
from core.data.prepare import run_task
from core.engine.commands.inference import infer
from core.engine.launch import build_trainer, run
from core.errors import ConfigError
from core.optim.groups import OptimConstructor
from core.optim.schedules import Schedule
from core.profile.measure import count_macs
from stvit.checkpoint import CheckpointMismatch, convert, revert
from stvit.interop.openmmlab import STViTRSwinBackbone
from stvit.models import STViTRSwin
from stvit.standin.glyphs import GLYPHS
from stvit.standin.scenes import render_scene

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(embed_dim=8, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2), window_size=4, per_window=2)


# ---------------------------------------------------------------------- data
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data set as the preparation task writes it."""
    root = tmp_path_factory.mktemp("glyphs") / "coco"
    run_task("stvit", "glyph_coco", [f"root={root}", "train=8", "val=3", "size=64", "most=4"])
    return root


def test_the_files_are_coco(data):
    coco = COCO(str(data / "annotations" / "instances_train2017.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(GLYPHS)
    assert len(coco.imgs) == 8 and len(coco.anns) >= 8
    for entry in coco.imgs.values():
        with Image.open(data / "train2017" / entry["file_name"]) as picture:
            assert picture.size == (entry["width"], entry["height"]) == (64, 64) and picture.mode == "RGB"
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        x, y, w, h = annotation["bbox"]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x, y, x + w, y + h)
        assert annotation["area"] == mask.sum() == coding.area(annotation["segmentation"])


def test_the_same_seed_gives_the_same_files_and_what_is_there_stays(data, tmp_path):
    words = [f"root={tmp_path}", "train=8", "val=3", "size=64", "most=4"]
    run_task("stvit", "glyph_coco", words)
    for file in sorted(p for p in data.rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / file.relative_to(data)).read_bytes()
    picture = tmp_path / "train2017" / "000000000001.png"
    stamp = picture.stat().st_mtime_ns
    assert run_task("stvit", "glyph_coco", words).count("already there") == 2
    assert picture.stat().st_mtime_ns == stamp
    picture.unlink()
    run_task("stvit", "glyph_coco", words)
    assert picture.read_bytes() == (data / "train2017" / picture.name).read_bytes()
    run_task("stvit", "glyph_coco", [*words, "seed=1"])
    assert picture.read_bytes() != (data / "train2017" / picture.name).read_bytes()


def test_another_data_set_is_not_overwritten(tmp_path):
    theirs = tmp_path / "annotations" / "instances_train2017.json"
    theirs.parent.mkdir()
    theirs.write_text(json.dumps({"info": {"description": "COCO 2017 Dataset"}, "images": []}))
    with pytest.raises(ConfigError, match="another data set"):
        run_task("stvit", "glyph_coco", [f"root={tmp_path}", "train=1", "val=1"])
    with pytest.raises(ConfigError, match="at least"):
        run_task("stvit", "glyph_coco", [f"root={tmp_path / 'new'}", "train=0"])


def test_objects_hide_each_other_but_never_wholly():
    hidden = []
    for number in range(60):
        pixels, glyphs = render_scene(np.random.default_rng(number), 64, glyphs=(3, 6))
        assert pixels.dtype == np.uint8 and pixels.shape == (64, 64, 3)
        covered = np.zeros((64, 64), int)
        for glyph in glyphs:
            covered += glyph.mask
            assert glyph.mask.any() and glyph.hidden <= 0.6
            hidden.append(glyph.hidden)
        assert covered.max() == 1  # a pixel belongs to one object
        assert not any(glyph.mask[[0, -1]].any() or glyph.mask[:, [0, -1]].any() for glyph in glyphs)
    assert 0.1 < np.mean([h > 0.05 for h in hidden]) < 0.9


# ---------------------------------------------------------------------- the paper's configs
@pytest.mark.parametrize(
    ("name", "parameters", "reduction"),
    [("small", 48_857_862, (0.305, 0.33)), ("base", 86_789_128, (0.319, 0.34))],
)
def test_the_backbones_of_table_5(name, parameters, reduction):
    costs = {}
    for kind in ("r_swin", "swin"):
        detector = build_trainer(compose([f"experiment=stvit/coco_cascade_mask_rcnn_{kind}_{name}_3x"]), "meta")
        backbone = detector.inference_network()
        (images,) = detector.example_inputs(1, "meta")
        assert images.shape == (1, 3, 800, 1280)
        costs[kind] = count_macs(backbone, (images,)).total
        if kind == "r_swin":
            assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert costs["swin"] == pytest.approx({"small": 187.60e9, "base": 331.06e9}[name], rel=1e-4)
    assert reduction[0] <= 1 - costs["r_swin"] / costs["swin"] <= reduction[1]


def test_the_recipe_of_section_4():
    cfg = compose(["experiment=stvit/coco_cascade_mask_rcnn_r_swin_small_3x"])
    heads = cfg.model.roi_head.bbox_head
    assert [list(h.bbox_coder.target_stds) for h in heads] == [
        [0.1, 0.1, 0.2, 0.2],
        [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067],
    ]
    assert all(h.loss_bbox.type == "mmdet.GIoULoss" and h.loss_bbox.loss_weight == 10 for h in heads)
    assert all(h.reg_decoded_bbox and not h.reg_class_agnostic for h in heads)
    assert all((h.num_shared_convs, h.num_shared_fcs, h.norm_cfg.type) == (4, 1, "SyncBN") for h in heads)
    assert cfg.model.rpn_head.loss_bbox.type == "mmdet.SmoothL1Loss"
    assert cfg.model.rpn_head.loss_bbox.beta == pytest.approx(1 / 9)
    assert [r.assigner.pos_iou_thr for r in cfg.model.train_cfg.rcnn] == [0.5, 0.6, 0.7]
    assert list(cfg.model.roi_head.stage_loss_weights) == [1, 0.5, 0.25]
    assert (cfg.model.neck.out_channels, cfg.model.neck.num_outs) == (256, 5)
    assert cfg.model.backbone.drop_path_rate == 0.2 and cfg.model.backbone.frozen_stages == -1
    assert cfg.train_dataloader.batch_size * 8 == 16 and cfg.model.data_preprocessor.pad_size_divisor == 32
    base = compose(["experiment=stvit/coco_cascade_mask_rcnn_r_swin_base_3x"])
    assert base.model.backbone.drop_path_rate == 0.3 and list(base.model.neck.in_channels) == [128, 256, 512, 1024]
    assert base.model.backbone.type == cfg.model.backbone.type != "stvit.models.SwinTransformer"


@pytest.mark.parametrize(("detector", "epochs", "steps"), [("cascade_mask", 36, (27, 33)), ("mask", 12, (8, 11))])
def test_the_schedule_of_section_4(detector, epochs, steps):
    cfg = compose([f"experiment=stvit/coco_{detector}_rcnn_r_swin_small_{epochs // 12}x"])
    assert cfg.train_cfg.max_epochs == epochs and cfg.optim_wrapper.get("clip_grad") is None
    options = {k: v for k, v in to_dict(cfg)["param_scheduler"].items() if k != "type"}
    schedule = Schedule(
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], cfg.optim_wrapper.optimizer.lr), **options
    )
    schedule.resolve(epochs * 1000, 1000)
    assert schedule.at(0) == pytest.approx(1e-7) and schedule.at(250) == pytest.approx((1e-4 + 1e-7) / 2)
    for epoch, rate in ((1, 1e-4), (steps[0], 1e-5), (steps[1], 1e-6)):
        assert schedule.at(1000 * epoch) == pytest.approx(rate)
        assert epoch == 1 or schedule.at(1000 * epoch - 1) == pytest.approx(10 * rate)


def test_the_sizes_of_section_4():
    cfg = to_dict(compose(["experiment=stvit/coco_cascade_mask_rcnn_r_swin_small_3x"]))
    steps = {step["type"].split(".")[-1]: step for step in cfg["train_dataloader"]["dataset"]["pipeline"]}
    assert steps["RandomFlip"]["prob"] == 0.5
    whole, cropped = steps["RandomChoice"]["transforms"]
    sizes = [[side, 1333] for side in range(480, 801, 32)]
    assert whole[0]["scales"] == cropped[2]["scales"] == sizes and whole[0]["keep_ratio"]
    assert cropped[0]["scales"] == [[400, 1333], [500, 1333], [600, 1333]]
    assert (cropped[1]["crop_type"], cropped[1]["crop_size"]) == ("absolute_range", [384, 600])
    resize = next(step for step in cfg["val_dataloader"]["dataset"]["pipeline"] if step["type"].endswith("Resize"))
    assert (resize["scale"], resize["keep_ratio"]) == ([1333, 800], True)


def test_decay_is_chosen_by_name_as_in_the_release():
    cfg = compose(["experiment=stvit/coco_cascade_mask_rcnn_r_swin_small_3x"])
    detector = build_trainer(cfg, "meta").network
    groups = OptimConstructor(to_dict(cfg)["optim_wrapper"])(detector).optimizer.param_groups
    assert all((g["lr"], g["betas"]) == (1e-4, (0.9, 0.999)) for g in groups)
    decays = {name: g["weight_decay"] for g in groups for name in g["param_names"]}
    spared = {name for name, decay in decays.items() if decay == 0}
    assert {decays[name] for name in decays.keys() - spared} == {0.05} and len(decays) == 492
    # What the release calls `norm`, `norm1`, ... and position tables; not `bn`, biases or layer scales.
    named = {n for n in decays if re.search(r"relative_position_bias_table|(^|\.)norms?\d*\.", n)}
    assert spared == {n for n in named if not n.startswith("backbone.stem.")}
    assert decays["backbone.stem.stages.0.norm.weight"] and decays["roi_head.bbox_head.0.shared_convs.0.bn.weight"]


def test_a_reduced_cascade_trains_with_the_recipe_of_coco(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose(
        [
            "experiment=stvit/coco_cascade_mask_rcnn_r_swin_small_3x",
            "runtime=cpu",
            f"train_dataloader.dataset.data_root={data}",
            f"+train_dataloader.dataset.metainfo={{classes: [{', '.join(GLYPHS)}]}}",
            "train_dataloader.batch_size=1",
            "train_dataloader.num_workers=0",
            "val_dataloader=null",
            "val_evaluator=null",
            "train_cfg.max_epochs=null",
            "+train_cfg.max_steps=1",
            "+model.backbone.embed_dim=8",
            "+model.backbone.num_heads=[1,1,2,2]",
            "+model.backbone.depths=[1,1,6,1]",
            "model.neck={in_channels: [8, 16, 32, 64], out_channels: 16}",
            "model.rpn_head={in_channels: 16, feat_channels: 16}",
            "model.roi_head.bbox_roi_extractor.out_channels=16",
            "model.roi_head.mask_roi_extractor.out_channels=16",
            "model.roi_head.mask_head={in_channels: 16, conv_out_channels: 16, num_classes: 8}",
        ]
    )
    for head in cfg.model.roi_head.bbox_head:
        head.update(in_channels=16, conv_out_channels=16, fc_out_channels=32, num_classes=8)
    result = run(cfg)
    assert result["status"] == "finished" and result["steps"] == 1
    (line,) = (json.loads(text) for text in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()[-1:])
    assert {f"s{stage}.loss_{kind}" for stage in range(3) for kind in ("cls", "bbox", "mask")} <= line.keys()


# ---------------------------------------------------------------------- a run
SMALL = [
    "runtime=cpu",
    "model.backbone.embed_dim=8",
    "model.backbone.num_heads=[1,1,2,2]",
    "model.neck.in_channels=[8,16,32,64]",
    "train_dataloader.batch_size=2",
    "param_scheduler.warmup=0",
    "log_every=1",
]


def glyph_cfg(data, *overrides):
    return compose(["experiment=stvit/glyph_coco", f"train_dataloader.dataset.data_root={data}", *SMALL, *overrides])


def test_it_trains_evaluates_resumes_and_infers(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = ["train_cfg.max_epochs=null", "+train_cfg.max_steps=2"]
    steps += ["checkpoint.every_steps=1", "checkpoint.keep_last=3"]
    whole = run(glyph_cfg(data, *steps, "run_dir=whole"))
    assert whole["steps"] == 2 and {"coco/bbox_mAP", "coco/segm_mAP"} <= whole["metrics"].keys()
    broken = run(glyph_cfg(data, *steps, "run_dir=broken"))
    (Path(broken["run_dir"]) / "result.json").unlink()
    find_checkpoint(broken["run_dir"]).unlink()
    again = run(glyph_cfg(data, *steps, "resume=broken"))
    assert "step_00000001" in again["resumed_from"] and again["metrics"] == whole["metrics"]
    first, second = (model_state(find_checkpoint(r["run_dir"])) for r in (whole, again))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any("generator" in k for k in first) and any("recovery" in k for k in first)

    options = SimpleNamespace(
        checkpoint="whole", input=str(data / "val2017"), output="shown", device="cpu", config_dir=None
    )
    records = infer(["experiment=stvit/glyph_coco", f"train_dataloader.dataset.data_root={data}", *SMALL], options)
    assert len(records) == 3
    for record in records:
        assert all(found["category"] in GLYPHS for found in record["detections"])
        assert Path(record["pictures"]["detections"]).is_file()


def test_semantic_layers_learn_through_the_detector(data):
    detector = build_trainer(glyph_cfg(data, "model.backbone.img_size=64"))
    total, _ = detector.parse_losses(detector.losses(detector.example_batch(1, "cpu")))
    total.backward()
    backbone = detector.network.backbone
    for part in (
        "generator.layers.0.attn.q",
        "generator.layers.1.attn.kv",
        "semantic.0.mlp.fc1",
        "recovery.layer.attn.q",
    ):
        gradient = backbone.get_parameter(f"stages.2.units.0.{part}.weight").grad
        assert gradient is not None and gradient.abs().sum() > 0


# ---------------------------------------------------------------------- in OpenMMLab's own hands
MMDET_CONFIG = """
custom_imports = dict(imports=['stvit'])
default_scope = 'mmdet'
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[93] * 3, std=[40] * 3, pad_size_divisor=32),
    backbone=dict(type='vitrine.STViTRSwin', embed_dim=8, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2), window_size=4,
                  per_window=2, frozen_stages=1, init_cfg=dict(type='Pretrained', checkpoint='{weights}')),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    bbox_head=dict(type='RetinaHead', num_classes=8, in_channels=16, stacked_convs=1, feat_channels=16,
                   anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]),
                   loss_cls=dict(type='FocalLoss', use_sigmoid=True)),
    train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                   sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10))
classes = dict(classes=('disc', 'ring', 'square', 'frame', 'triangle', 'plus', 'saltire', 'bar'))
train_dataloader = dict(
    batch_size=2, sampler=dict(type='DefaultSampler'),
    dataset=dict(type='CocoDataset', metainfo=classes, data_root='{data}', data_prefix=dict(img='train2017/'),
                 ann_file='annotations/instances_train2017.json',
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                           dict(type='PackDetInputs')]))
val_dataloader = dict(
    batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CocoDataset', metainfo=classes, data_root='{data}', data_prefix=dict(img='val2017/'),
                 ann_file='annotations/instances_val2017.json', test_mode=True,
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
                           dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor'))]))
val_evaluator = dict(type='CocoMetric', ann_file='{data}/annotations/instances_val2017.json', metric='bbox')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
"""


@pytest.mark.child
def test_the_backbone_works_in_mmdets_own_runner(data, tmp_path):
    torch.manual_seed(3)
    before = STViTRSwin(features_only=True, **TINY).state_dict()
    torch.save(before, tmp_path / "ours.pth")
    text = MMDET_CONFIG.replace("{data}", str(data)).replace("{weights}", str(tmp_path / "ours.pth"))
    (tmp_path / "config.py").write_text(text)
    code = (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from mmengine.config import Config\n"
        "from mmengine.runner import Runner\n"
        "cfg = Config.fromfile('config.py')\n"
        "cfg.work_dir = 'work'\n"
        "runner = Runner.from_cfg(cfg)\n"
        "runner.train()\n"
        "torch.save(runner.model.backbone.state_dict(), 'after.pth')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "bbox_mAP" in done.stdout + done.stderr
    after = torch.load(tmp_path / "after.pth", weights_only=True)
    frozen = [k for k in before if k.startswith(("stem.", "stages.0.", "norms.0."))]
    assert any("running_mean" in k for k in frozen) and any("qkv" in k for k in frozen)
    for key in frozen:
        assert torch.equal(after[key], before[key])  # loaded, and neither trained nor counted by batch norm since
    for key in ("stages.2.units.0.generator.layers.0.attn.q.weight", "stages.2.units.0.recovery.layer.attn.q.weight"):
        assert not torch.equal(after[key], before[key])
        torch.testing.assert_close(after[key], before[key], atol=0.01, rtol=0)  # two steps away from what was loaded


@pytest.mark.child
def test_one_of_mmdets_own_configs_takes_the_backbone(tmp_path):
    """The card's lines; here the backbone is smaller."""
    (tmp_path / "mine.py").write_text(
        "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n"
        "custom_imports = dict(imports=['stvit'])\n"
        "model = dict(\n"
        "    backbone=dict(_delete_=True, type='vitrine.STViTRSwin', embed_dim=8, depths=(1, 1, 6, 1),\n"
        "                  num_heads=(1, 1, 2, 2)),\n"
        "    neck=dict(in_channels=[8, 16, 32, 64]))\n"
    )
    code = (
        "import torch\n"
        "from mmengine.config import Config\n"
        "from mmengine.registry import MODELS, init_default_scope\n"
        "cfg = Config.fromfile('mine.py')\n"
        "init_default_scope(cfg.default_scope)\n"
        "maps = MODELS.build(cfg.model).extract_feat(torch.zeros(1, 3, 64, 96))\n"
        "print([tuple(m.shape) for m in maps])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    sides = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert done.stdout.strip().splitlines()[-1] == str([(1, 256, *side) for side in sides])


def test_frozen_stages_stay_frozen_in_training_mode():
    backbone = STViTRSwinBackbone(**TINY, frozen_stages=1)
    assert backbone.train() is backbone and backbone.eval() is backbone and backbone.train(True) is backbone
    fixed = [backbone.stem, backbone.stages[0], backbone.norms["0"]]
    assert not any(module.training for part in fixed for module in part.modules())
    assert all(stage.training for stage in backbone.stages[1:]) and backbone.norms["1"].training
    fixed = {id(p) for part in fixed for p in part.parameters()}
    assert all(p.requires_grad == (id(p) not in fixed) for p in backbone.parameters())


@pytest.mark.parametrize("kind", ["released classifier", "our backbone", "our detector", "released detector"])
def test_init_cfg_reads_weights_of_either_layout(kind, tmp_path):
    torch.manual_seed(3)
    dense = STViTRSwin(features_only=True, **TINY).state_dict()
    classifier = STViTRSwin(num_classes=5, **TINY).state_dict()
    ours = {f"backbone.{k}": v for k, v in dense.items()} | {"neck.fpn_convs.0.conv.bias": torch.ones(16)}
    theirs = {f"backbone.{k}": v for k, v in revert(dense, layout="official").items()}
    content = {
        "released classifier": {"model": revert(classifier, layout="official"), "epoch": 300},
        "our backbone": dense,
        "our detector": {"state_dict": ours},
        "released detector": {"state_dict": theirs | {"neck.fpn_convs.0.conv.bias": torch.ones(16)}},
    }
    torch.save(content[kind], tmp_path / "weights.pth")
    backbone = STViTRSwinBackbone(**TINY, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth")))
    fresh = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.init_weights()
    loaded = backbone.state_dict()
    expected = {k: classifier.get(k, fresh[k]) for k in fresh} if "classifier" in kind else dense
    assert loaded.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in loaded.items())
    assert not torch.equal(loaded["stages.0.blocks.0.attn.qkv.weight"], fresh["stages.0.blocks.0.attn.qkv.weight"])


@pytest.fixture
def log(monkeypatch):
    """What is written to the log of the run."""
    lines = []
    monkeypatch.setattr("stvit.checkpoint.swin.print_log", lambda text, logger, level: lines.append(text))
    return lines


@pytest.mark.parametrize("way", ["init_cfg", "convert", "bare"])
def test_released_detectors_bring_the_masks_they_were_trained_with(way, tmp_path, log):
    """Maps on a padded image equal the release's; the log says so, and a mode that was asked for is kept."""
    torch.manual_seed(3)
    released = STViTRSwin(features_only=True, mask_mode="official", **TINY, layer_scale=0.5).eval()
    state = revert(released.state_dict(), layout="official")
    if way != "bare":
        state = {f"backbone.{k}": v for k, v in state.items()} | {"neck.fpn_convs.0.conv.bias": torch.ones(16)}
    torch.save({"state_dict": state}, tmp_path / "detector.pth")
    images = torch.randn(1, 3, 200, 264)  # 13 x 17 tokens in the third stage: padding below and beside

    def loaded(**options):
        cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "detector.pth"))
        backbone = STViTRSwinBackbone(**TINY, layer_scale=0.5, init_cfg=cfg, **options)
        if way == "init_cfg":
            backbone.init_weights()
        else:
            backbone.load_state_dict(convert(torch.load(tmp_path / "detector.pth"), backbone))
        return backbone.eval()

    with torch.no_grad():
        expected = released(images)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(loaded()(images), expected, strict=True))
        assert len(log) == 1 and "mask_mode=official" in log.pop()
        exact = loaded(mask_mode="exact")(images)
        assert len(log) == 1 and "this model has mask_mode=exact" in log.pop()
        assert not torch.allclose(exact[2], expected[2], atol=1e-3)
        loaded(mask_mode="official")
        assert not log


def test_other_weights_leave_the_exact_masks(log):
    for state in (
        STViTRSwin(features_only=True, **TINY).state_dict(),
        {"model": revert(STViTRSwin(num_classes=5, **TINY).state_dict(), layout="official")},
    ):
        backbone = STViTRSwin(features_only=True, **TINY)
        backbone.load_state_dict(convert(state, backbone))
        assert backbone.mask_mode == "exact" and not log
    # Where the model is not at hand, the one who converts is told.
    convert(revert(STViTRSwin(features_only=True, **TINY).state_dict(), layout="official"), "dense")
    assert len(log) == 1 and "mask_mode=official" in log[0]


def test_modes_of_masks_are_exchanged_whole():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 200, 264)
    for recover, tokens in (("dumbbell", "semantic"), ("none", "semantic"), ("dumbbell", "pooled")):
        options = dict(features_only=True, recover=recover, tokens=tokens, **TINY, layer_scale=0.5)
        one = STViTRSwin(mask_mode="exact", **options).eval()
        for mode in ("official", "none", "exact"):
            one.set_mask_mode(mode)
            other = STViTRSwin(mask_mode=mode, **options).eval()
            other.load_state_dict(one.state_dict())
            with torch.no_grad():
                assert all(torch.equal(a, b) for a, b in zip(one(images), other(images), strict=True))


def test_init_cfg_that_cannot_be_meant_or_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="Pretrained"):
        STViTRSwinBackbone(**TINY, init_cfg=dict(type="Xavier"))
    torch.save({"model": STViTRSwin(num_classes=5, **{**TINY, "embed_dim": 16}).state_dict()}, tmp_path / "other.pth")
    backbone = STViTRSwinBackbone(**TINY, init_cfg=cfg(str(tmp_path / "other.pth")))
    with pytest.raises(CheckpointMismatch):
        backbone.init_weights()
    backbone = STViTRSwinBackbone(**TINY, init_cfg=cfg("http://127.0.0.1:9/w.pth"))  # nothing listens there
    with pytest.raises(ConfigError, match=r"cannot load http://127\.0\.0\.1:9/w\.pth .*Download the file"):
        backbone.init_weights()
    backbone = STViTRSwinBackbone(**TINY, init_cfg=cfg(str(tmp_path / "other.pth"), prefix="student"))
    with pytest.raises(ConfigError, match=r"begins with 'student\.'"):
        backbone.init_weights()
    plain = STViTRSwinBackbone(**TINY)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    plain.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def cfg(checkpoint, **more):
    return dict(type="Pretrained", checkpoint=checkpoint, **more)


def test_init_cfg_loads_addresses_by_mmengines_loader_and_parts_below_a_prefix(tmp_path):
    source = STViTRSwin(num_classes=5, **TINY)
    weight = source.stages[2].units[0].base[0].attn.qkv.weight
    both = {f"teacher.{k}": v for k, v in source.state_dict().items()}
    both |= {f"student.{k}": torch.zeros_like(v) for k, v in source.state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    asked = []

    def fetch(place, map_location):
        asked.append((place, map_location))
        return torch.load(tmp_path / "w.pth", weights_only=True)

    CheckpointLoader.register_scheme("vitrine-test://", fetch, force=True)
    for place in (str(tmp_path / "w.pth"), "vitrine-test://w.pth"):
        backbone = STViTRSwinBackbone(**TINY, init_cfg=cfg(place, prefix="teacher."))
        backbone.init_weights()
        assert torch.equal(backbone.stages[2].units[0].base[0].attn.qkv.weight, weight)
    assert asked == [("vitrine-test://w.pth", "cpu")]
