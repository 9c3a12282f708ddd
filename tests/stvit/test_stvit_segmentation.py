"""Semantic segmentation: heads, the plain ViT with recovery, losses, evaluation, ADE20K's files, and runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from core.config import compose, to_dict
from core.config.registry import build
from core.data import DataFileError, MissingDataError
from core.data.prepare import run_task
from core.engine.commands.inference import infer
from core.engine.launch import build_trainer, run
from core.errors import ConfigError
from core.profile.measure import count_macs
from stvit.data.ade20k import ADE20K, SegmentationEval, SegmentationTrain, fitted_size
from stvit.losses import IGNORE, segmentation_loss
from stvit.models import STViTRSwin
from stvit.models.recovery_vit import RecoveryViT, UpsampleRecovery
from stvit.models.segmentation import FCNHead, PatchHead, PyramidPooling, SegmentationNetwork, UperHead
from stvit.standin.glyphs import BRIGHTEST, DARKEST, GLYPHS, GlyphField
from stvit.trainer.segmentation import SegmentationTrainer, colours
from tests.gradients import unreached

SMALL = dict(img_size=28, patch_size=4, embed_dim=16, num_heads=2, units=1, token_grid=3, stem="conv")


def maps(channels=(4, 6, 8, 10), size=16):
    return [torch.randn(2, c, size >> i, size >> i, requires_grad=True) for i, c in enumerate(channels)]


# ---------------------------------------------------------------------- heads
def test_uper_head_reads_every_level_and_answers_at_the_finest():
    head = UperHead((4, 6, 8, 10), 5, channels=8).eval()
    levels = maps()
    scores = head(levels)
    assert scores.shape == (2, 5, 16, 16)
    scores.square().sum().backward()
    assert all(level.grad.abs().sum() > 0 for level in levels)
    with torch.no_grad():
        head.fuse.conv.weight[:, 8:] = 0  # the finest level alone is read: the others come down the pyramid
    again = maps()
    head(again).square().sum().backward()
    assert all(level.grad.abs().sum() > 0 for level in again)


def test_uper_head_has_the_published_number_of_parameters():
    # Swin-S: 768 + 4 x 512 channels into the pyramid's mix, three laterals, three smoothings, one fusion, 150 classes.
    conv = lambda a, b, k: a * b * k * k + 2 * b  # noqa: E731
    expected = 4 * conv(768, 512, 1) + conv(768 + 2048, 512, 3) + sum(conv(c, 512, 1) for c in (96, 192, 384))
    expected += 3 * conv(512, 512, 3) + conv(2048, 512, 3) + 512 * 150 + 150
    assert sum(p.numel() for p in UperHead((96, 192, 384, 768), 150).parameters()) == expected


def test_pyramid_pooling_sees_the_whole_map_from_everywhere():
    module = PyramidPooling(3, 4, (1, 2)).eval()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    module(x)[0, :, 0, 0].sum().backward()
    assert x.grad[0, :, -1, -1].abs().sum() > 0


def test_auxiliary_and_patch_heads():
    assert FCNHead(8, 5, channels=8, index=2).eval()(maps()).shape == (2, 5, 4, 4)
    head = PatchHead(10, 5, patch_size=4).eval()
    x = torch.randn(1, 10, 3, 2, requires_grad=True)
    scores = head([x])
    assert scores.shape == (1, 5, 12, 8)
    (gradient,) = torch.autograd.grad(scores[0, :, 5, 6].sum(), x)
    assert gradient[0, :, 1, 1].abs().sum() > 0 and gradient.count_nonzero() == 10  # its own token alone


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_network_answers_at_the_images_size_with_a_swin_backbone(size):
    backbone = STViTRSwin(
        embed_dim=8, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2), window_size=4, per_window=2, features_only=True
    )
    network = SegmentationNetwork(backbone, UperHead((8, 16, 32, 64), 5, channels=8), FCNHead(32, 5, channels=8)).eval()
    scores, extra = network(torch.randn(1, 3, *size), auxiliary=True)
    assert scores.shape == extra.shape == (1, 5, *size)
    assert torch.equal(network(torch.ones(1, 3, *size)), network(torch.ones(1, 3, *size), auxiliary=True)[0])
    assert SegmentationNetwork(backbone, network.head).eval()(torch.ones(1, 3, *size), auxiliary=True)[1] is None


# ---------------------------------------------------------------------- the plain ViT with recovery
@pytest.mark.parametrize("tokens", ["semantic", "pooled", "all"])
def test_recovery_vit_gives_every_token_back_at_any_size(tokens):
    model = RecoveryViT(**SMALL, tokens=tokens).eval()
    assert model(torch.randn(2, 3, 28, 28))[0].shape == (2, 16, 7, 7)
    assert model(torch.randn(1, 3, 40, 24))[0].shape == (1, 16, 10, 6)
    model.train()
    model(torch.randn(2, 3, 28, 28))[0].square().sum().backward()
    assert unreached(model) == []


def test_pooled_tokens_are_enlarged_and_added():
    module, x = UpsampleRecovery(4), torch.randn(2, 24, 4)
    tokens = torch.tensor([[1.0], [3.0]]).repeat(2, 1, 4)  # 1 x 2 tokens over 4 x 6 positions
    with torch.no_grad():
        nn.init.zeros_(module.mlp.fc2.weight)
        nn.init.zeros_(module.mlp.fc2.bias)
        added = (module(x, tokens, (4, 6), (1, 2)) - x).reshape(2, 4, 6, 4)
        columns = torch.tensor([1, 1, 1 + 2 / 3, 1 + 4 / 3, 3, 3])
        assert torch.allclose(added, columns[None, None, :, None].expand(2, 4, 6, 4), atol=1e-6)
        nn.init.ones_(module.mlp.fc2.bias)
        assert torch.allclose(
            module(x, tokens, (4, 6), (1, 2)) - x - added.flatten(1, 2), torch.ones(2, 24, 4), atol=1e-6
        )


def test_positions_stretch_to_other_sizes_along_their_own_axes():
    model = RecoveryViT(**{**SMALL, "units": 0})
    model.norm = nn.Identity()
    with torch.no_grad():
        for parameter in model.stem.parameters():
            parameter.zero_()
        rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
        model.pos_embed[0, :, 0], model.pos_embed[0, :, 1] = rows.flatten(), columns.flatten()
        (grid,) = model(torch.zeros(1, 3, 40, 24))
    assert torch.allclose(grid[0, 0], grid[0, 0, :, :1].expand(10, 6), atol=1e-4) and (grid[0, 0].diff(dim=0) > 0).all()
    assert torch.allclose(grid[0, 1], grid[0, 1, :1].expand(10, 6), atol=1e-4) and (grid[0, 1].diff(dim=1) > 0).all()


def test_what_reaches_a_token_from_afar():
    """With no layer on image tokens, only semantic tokens or pooled ones connect distant patches."""
    reach = {}
    for tokens in ("semantic", "pooled"):
        torch.manual_seed(0)
        model = RecoveryViT(**{**SMALL, "stem": "patch"}, base_depth=0, tokens=tokens, pool="avg", init="fan_in").eval()
        image = torch.randn(1, 3, 28, 28, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(image)[0][0, :8, 0, 0].sum(), image)
        reach[tokens] = gradient[0, :, 24:, 24:].abs().sum()
        assert reach[tokens] > 0
    alone = RecoveryViT(**{**SMALL, "stem": "patch"}, base_depth=0, tokens="pooled", pool="avg").eval()
    image = torch.randn(1, 3, 28, 28)
    other = image.clone()
    other[..., 24:, 24:] += 1
    assert not torch.allclose(alone(image)[0][..., 0, 0], alone(other)[0][..., 0, 0], atol=1e-6)
    for layer in [*alone.units[0].reducer.layers, *alone.units[0].semantic]:
        nn.init.zeros_(layer.attn.proj.weight)
    assert torch.allclose(alone(image)[0][..., 0, 0], alone(other)[0][..., 0, 0])


def test_fewer_tokens_cost_less_and_all_variants_share_the_stem():
    cost = {}
    for tokens in ("semantic", "pooled", "all"):
        with torch.device("meta"):
            model = RecoveryViT(patch_size=16, tokens=tokens, units=2)
            cost[tokens] = count_macs(model, (torch.zeros(1, 3, 224, 224),)).total
            if tokens == "semantic":
                first, second = (unit.reducer.global_centres for unit in model.units)
                assert first.shape == (1, 16, 384) and second is None  # global centres enter the first unit alone
    assert cost["pooled"] < cost["semantic"] < 0.65 * cost["all"]
    with pytest.raises(ValueError, match="semantic, pooled, all"):
        RecoveryViT(**SMALL, tokens="sematic")
    with pytest.raises(ValueError, match="fan_in"):
        RecoveryViT(**SMALL, init="he")


# ---------------------------------------------------------------------- losses and evaluation
def test_the_loss_is_the_mean_over_known_pixels():
    scores = torch.randn(2, 4, 5, 6, requires_grad=True)
    mask = torch.randint(4, (2, 5, 6))
    mask[0, :2] = IGNORE
    chosen = scores.permute(0, 2, 3, 1)[mask != IGNORE]
    expected = nn.functional.cross_entropy(chosen, mask[mask != IGNORE])
    torch.testing.assert_close(segmentation_loss(scores, mask), expected)
    segmentation_loss(scores, mask).backward()
    assert scores.grad[0, :, :2].abs().sum() == 0 and scores.grad[0, :, 2:].abs().sum() > 0
    nothing = segmentation_loss(scores, torch.full_like(mask, IGNORE))
    assert nothing == 0 and torch.autograd.grad(nothing, scores)[0].isfinite().all()
    extreme = torch.tensor([[[[3e4]], [[-3e4]]]], dtype=torch.bfloat16)
    assert segmentation_loss(extreme, torch.ones(1, 1, 1, dtype=torch.long)).isfinite()


class Constant(nn.Module):
    """Scores that are the image's channels: what a prediction at another scale should be is known."""

    def forward(self, images, auxiliary=False):
        return (images, images.flip(1)) if auxiliary else images


def test_losses_weigh_the_auxiliary_head():
    trainer = SegmentationTrainer(Constant(), auxiliary_weight=0.4)
    batch = {"image": torch.randn(2, 3, 8, 8), "mask": torch.randint(3, (2, 8, 8))}
    batch["mask"][0, :5] = IGNORE
    terms = trainer.losses(batch)
    torch.testing.assert_close(terms["loss_seg"], segmentation_loss(batch["image"], batch["mask"]))
    torch.testing.assert_close(terms["loss_aux"], 0.4 * segmentation_loss(batch["image"].flip(1), batch["mask"]))
    known = batch["mask"] != IGNORE
    assert terms["accuracy"] == (batch["image"].argmax(1) == batch["mask"])[known].float().mean()


def test_scales_and_mirroring_average_probabilities_at_the_masks_size():
    image = torch.randn(1, 3, 32, 64).repeat_interleave(1, 0)
    plain = SegmentationTrainer(Constant(), divisor=8)
    views = SegmentationTrainer(Constant(), scales=(0.5, 1.0, 1.5), flip=True, divisor=8)
    flat = torch.randn(1, 3, 1, 1).expand(1, 3, 32, 64)
    torch.testing.assert_close(views.probabilities(flat, (40, 80)), plain.probabilities(flat, (40, 80)))
    averaged = views.probabilities(image, (32, 64))
    torch.testing.assert_close(averaged.sum(1), torch.ones(1, 32, 64))
    # A mirrored pass is mirrored back: with one scale the channels of this network come out as they went in.
    mirrored = SegmentationTrainer(Constant(), flip=True).probabilities(image, (32, 64))
    torch.testing.assert_close(mirrored, image.softmax(1))
    seen = []
    views.network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    views.probabilities(image, (10, 20))
    assert seen == [(16, 32)] * 2 + [(32, 64)] * 2 + [(48, 96)] * 2
    with pytest.raises(ValueError, match="scales"):
        SegmentationTrainer(Constant(), scales=())


def test_mean_iou_counts_the_set_not_batches_and_leaves_unknown_pixels_out():
    evaluator = to_dict(compose(["experiment=stvit/ade20k_upernet_r_swin_small"]))["val_evaluator"]
    for metric in evaluator["metrics"].values():
        metric["num_classes"] = 4
    metric = build(evaluator)
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 6), (3, 5), (7, 2)]
    truths = [torch.randint(4, (1, *s), generator=generator) for s in sizes]
    found = [torch.randint(4, (1, *s), generator=generator) for s in sizes]
    truths[0][0, :2] = IGNORE
    for prediction, mask in zip(found, truths, strict=True):
        metric.process({}, {"prediction": prediction, "mask": mask})
    figures = metric.evaluate(3)
    t, p = (torch.cat([x.flatten() for x in xs]) for xs in (truths, found))
    t, p = t[t != IGNORE], p[t != IGNORE]
    ious = [((t == k) & (p == k)).sum() / ((t == k) | (p == k)).sum() for k in range(4)]
    assert figures["miou"] == pytest.approx(float(torch.stack(ious).mean()))
    assert figures["pixel_accuracy"] == pytest.approx(float((t == p).float().mean()))
    per_batch = [MulticlassJaccardIndex(4, ignore_index=IGNORE)(a, b) for a, b in zip(found, truths, strict=True)]
    assert figures["miou"] != pytest.approx(float(torch.stack(per_batch).mean()))


def test_colours_tell_classes_apart():
    palette = colours(torch.arange(256)[None])[0]
    assert len(np.unique(palette[:150], axis=0)) == 150 and not palette[IGNORE].any() and not palette[0].any()


# ---------------------------------------------------------------------- ADE20K
@pytest.fixture
def ade(tmp_path):
    """Four pictures in the benchmark's layout; labels are the column's number, so that geometry can be checked."""
    rng = np.random.default_rng(0)
    for split, names in (("training", ["a", "b", "c"]), ("validation", ["d"])):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for name in names:
            pixels = rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)
            labels = np.broadcast_to(np.arange(90, dtype=np.uint8) // 10, (60, 90)).copy()  # 0 to 8
            pixels[..., 0] = labels * 20
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"ADE_{name}.jpg", quality=100, subsampling=0)
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"ADE_{name}.png")
    return tmp_path


def test_ade20k_shifts_labels_and_keeps_masks_whole(ade):
    data = ADE20K(ade, "validation", SegmentationEval(short=32, divisor=16))
    sample = data[0]
    assert len(data) == 1 and sample["sample_id"] == "ADE_d"
    assert sample["image"].shape == (3, 32, 48) and sample["image"].dtype == torch.float32
    assert sample["mask"].shape == (60, 90) and sample["mask"].dtype == torch.int64
    assert sample["mask"].unique().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, IGNORE]
    assert (sample["mask"][:, :10] == IGNORE).all() and (sample["mask"][:, 10:20] == 0).all()
    raw = ADE20K(ade, "validation", SegmentationEval(short=32), reduce_zero_label=False)[0]
    assert raw["mask"].unique().tolist() == list(range(9))


def test_masks_of_every_kind_hold_the_numbers_in_the_file(ade):
    """0, 1, 2, 150 are other, the first, the second and the last class, with a palette and without."""
    place, numbers = ade / "annotations" / "validation" / "ADE_d.png", np.repeat([0, 1, 2, 150], 24)[None, :90]
    grey = Image.fromarray(np.broadcast_to(numbers.astype(np.uint8), (60, 90)).copy())
    palette = grey.convert("P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    deep = Image.fromarray(np.broadcast_to(numbers.astype(np.uint16) * 2, (60, 90)).copy())
    for image, expected in ((grey, [255, 0, 1, 149]), (palette, [255, 0, 1, 149]), (deep, [255, 1, 3, 299])):
        image.save(place)
        mask = ADE20K(ade, "validation")[0]["mask"]
        assert mask.dtype == torch.int64 and mask[0, [0, 24, 48, 72]].tolist() == expected
    place.rename(place.with_name("ADE_d.PNG"))
    (place.parent / "._ADE_d.PNG").write_bytes(b"of macOS")
    (ade / "images" / "validation" / "._ADE_d.jpg").write_bytes(b"of macOS")
    assert len(ADE20K(ade, "validation")) == 1 and ADE20K(ade, "validation")[0]["mask"][0, 72] == 299
    Image.fromarray(np.zeros((60, 90, 3), np.uint8) + np.arange(3, dtype=np.uint8)).save(place)
    with pytest.raises(DataFileError, match=r"ADE_d\.png: it is PNG of mode RGB.*colours are no labels"):
        place.with_name("ADE_d.PNG").unlink()
        ADE20K(ade, "validation")[0]


def test_photographs_that_a_camera_turned_stand_as_their_masks_do(ade):
    files = [
        ade / kind / "validation" / f"ADE_d.{suffix}" for kind, suffix in (("images", "jpg"), ("annotations", "png"))
    ]
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(files[0]) as image:
        image.save(files[0], exif=exif, quality=100, subsampling=0)
    assert ADE20K(ade, "validation", lambda pair: pair)[0]["image"].shape == (3, 60, 90)  # masks of the stored pixels
    with Image.open(files[1]) as mask:
        mask.save(files[1], exif=exif)
    sample = ADE20K(ade, "validation", lambda pair: pair)[0]
    assert sample["image"].shape == (3, 90, 60) and sample["mask"].shape == (90, 60)
    assert (sample["image"][0].float() - 20 * (sample["mask"] + 1) % (20 * (IGNORE + 1))).abs().median() < 6


def test_training_transform_moves_pixels_and_labels_together(ade):
    transform = SegmentationTrain(size=48, scale=(0.7, 1.6), jitter=(0, 0, 0, 0))
    data = ADE20K(ade, "training", transform)
    widths, flipped = set(), set()
    for seed in range(12):
        np.random.seed(seed)
        sample = data[seed % 3]
        image, mask = sample["image"], sample["mask"]
        assert image.shape == (3, 48, 48) and mask.shape == (48, 48)
        red = (image[0] * 0.229 + 0.485) * 255
        known = mask != IGNORE
        # The red channel is 20 times the file's label, which is the mask's plus one.
        error = (red - 20 * (mask + 1))[known].abs()
        assert error.median() < 6 and (error < 15).float().mean() > 0.8
        columns = mask.where(known, torch.tensor(-1)).amax(0)
        flipped.add(bool(columns[4] > columns[-5]))
        widths.add(int((columns == columns[24]).sum()))
    assert flipped == {True, False} and len(widths) > 2  # mirrored or not, at several scales


def test_crops_are_not_filled_by_one_class():
    mask = torch.zeros(200, 200, dtype=torch.long)
    mask[:, 100:] = 1
    transform = SegmentationTrain(size=64, dominance=0.75)
    shares = []
    for seed in range(30):
        np.random.seed(seed)
        _, crop = transform._crop(torch.zeros(3, 200, 200), mask)
        shares.append(float(crop.float().mean()))
    mixed = np.mean([0.2 < share < 0.8 for share in shares])
    assert mixed > 0.9  # at random it would be a third


def test_sizes_keep_their_aspect():
    assert fitted_size((300, 600), 150, 2048) == [150, 300]
    assert fitted_size((100, 4000), 512, 2048) == [51, 2048]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: root.rename(root.parent / "gone"), r"train_dataloader\.dataset\.root"),
        (
            lambda root: (root / "annotations" / "training" / "ADE_b.png").unlink(),
            r"1 pictures have no annotation.*ADE_b",
        ),
    ],
)
def test_missing_files_are_named(ade, spoil, message):
    spoil(ade)
    with pytest.raises(MissingDataError, match=message):
        ADE20K(ade, "training")


def test_a_picture_with_the_annotation_of_another_is_an_error(ade):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(ade / "annotations" / "training" / "ADE_a.png")
    with pytest.raises(ValueError, match=r"ADE_a\.png is \(5, 5\)"):
        ADE20K(ade, "training")[0]
    with pytest.raises(ValueError, match="training or validation"):
        ADE20K(ade, "train")


# ---------------------------------------------------------------------- runs
UPER = [
    "experiment=stvit/ade20k_upernet_r_swin_small",
    "runtime=cpu",
    "+model.network.backbone.embed_dim=8",
    "+model.network.backbone.depths=[1,1,6,1]",
    "+model.network.backbone.num_heads=[1,1,2,2]",
    "+model.network.backbone.window_size=4",
    "model.network.backbone.key_windows=[8,12,6]",
    "model.network.backbone.per_window=2",
    "model.network.head.in_channels=[8,16,32,64]",
    "model.network.head.channels=8",
    "model.network.auxiliary_head.in_channels=32",
    "model.network.auxiliary_head.channels=8",
    "model.transform.short=64",
    "train_dataloader.dataset.transform.size=64",
    "val_dataloader.dataset.transform.short=64",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "param_scheduler.warmup=1",
    "log_every=1",
]


def test_upernet_trains_on_ade20k_evaluates_and_infers(ade, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [*UPER, f"train_dataloader.dataset.root={ade}"]
    several = ["model.scales=[0.5,1.0]", "model.flip=true"]
    result = run(compose([*overrides, *several, "train_cfg.max_steps=2", "train_cfg.val_every_steps=2", "run_dir=run"]))
    assert result["steps"] == 2 and 0 <= result["metrics"]["miou"] <= 1
    assert list((tmp_path / "run" / "media").glob("segmentation_*.png"))
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss_seg", "loss_aux", "accuracy"} <= steps[0].keys()
    picture = ade / "images" / "validation" / "ADE_d.jpg"
    options = SimpleNamespace(checkpoint="run", input=str(picture), output="shown", device="cpu", config_dir=None)
    (record,) = infer(overrides, options)
    assert (record["width"], record["height"]) == (90, 60)
    assert sum(entry["share"] for entry in record["classes"]) == pytest.approx(1, abs=1e-3)
    with Image.open(record["pictures"]["labels"]) as labels:
        assert labels.size == (90, 60) and set(np.unique(labels)) == {entry["index"] for entry in record["classes"]}


@pytest.mark.parametrize("name", ["glyph_seg", "glyph_seg_pooled", "glyph_seg_full"])
def test_the_dense_stand_in_learns(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["runtime=cpu", "train_dataloader.dataset.count=128", "test_dataloader.dataset.count=64"]
    overrides += ["train_cfg.max_epochs=2", "log_every=1"]
    result = run(compose([f"experiment=stvit/{name}", *overrides]))
    losses = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < 0.8 * losses[0] and result["metrics"]["pixel_accuracy"] > 0.5


def test_published_sizes_of_the_backbones():
    for size, parameters in (("small", 48_857_862), ("base", 86_789_128)):
        trainer = build_trainer(compose([f"experiment=stvit/ade20k_upernet_r_swin_{size}"]), "meta")
        assert sum(p.numel() for p in trainer.network.backbone.parameters()) == parameters


def test_glyphs_as_files_are_the_pictures_of_the_data_set_and_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run_task("stvit", "glyph_pictures", ["root=glyphs", "count=3", "seed=5"])
    assert "3 pictures" in text
    field = GlyphField("test", count=3, seed=5, mask=True)
    trainer = build_trainer(compose(["experiment=stvit/glyph_seg"])).eval()
    assert trainer.classes == ["background", *GLYPHS]
    for index in range(3):
        sample = field[index]
        with Image.open(f"glyphs/images/{index:06d}.png") as file:
            image = trainer.transform(file.convert("RGB"))
        inside = sample["image"].clamp(DARKEST, BRIGHTEST)
        assert (image - inside).abs().max() < 0.51 * (BRIGHTEST - DARKEST) / 255
        with Image.open(f"glyphs/masks/{index:06d}.png") as file:
            assert np.array_equal(np.array(file), sample["mask"].numpy())
    with pytest.raises(ConfigError, match="count is at least 1"):
        run_task("stvit", "glyph_pictures", ["root=glyphs", "count=0"])
    with pytest.raises(ConfigError, match="no split 'dev'"):
        run_task("stvit", "glyph_pictures", ["root=glyphs", "split=dev"])
    Image.new("RGB", (60, 29)).save("glyphs/images/wide.png")
    inference = trainer.infer(Path("glyphs/images/wide.png"))
    assert inference.pictures["labels"].shape == (29, 60)
    assert {entry["class"] for entry in inference.record["classes"]} <= set(trainer.classes)
