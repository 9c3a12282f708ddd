"""Weights in the reference's and DeiT's layouts, and the losses."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stvit import ClassificationTrainer
from stvit.checkpoint import CheckpointMismatch, convert, from_deit, resize_relative_bias, revert
from stvit.losses import classification_loss, label_smoothing_cross_entropy, soft_target_cross_entropy
from stvit.models import Block, ConvStem, SemanticTokenViT, STViTSwin, build_pool, stvit_deit_small

TINY = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=32, depth=5, num_heads=2, base_depth=2, token_grid=2)


def tiny(**options: object) -> SemanticTokenViT:
    return SemanticTokenViT(**(TINY | options))


def deit(**options: object) -> VisionTransformer:
    sizes = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=32, depth=5, num_heads=2)
    return VisionTransformer(**(sizes | options)).eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------ DeiT


def test_a_deit_checkpoint_gives_deit_itself() -> None:
    source = deit()
    model = tiny(tokens="all", class_token=True).eval()
    model.load_state_dict(from_deit({"model": source.state_dict()}, model))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), source(images), rtol=1e-4, atol=1e-5)
    assert same(revert(model.state_dict(), layout="deit"), dict(source.state_dict()))


def test_deit_small_starts_stvit_deit_small() -> None:
    source = timm.create_model("deit_small_patch16_224").state_dict()
    model = stvit_deit_small()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(from_deit(source, model))
    ours = model.state_dict()
    assert torch.equal(ours["pos_embed"], source["pos_embed"][:, 1:])
    for index, place in (
        (0, "base.0"),
        (3, "base.3"),
        (4, "reducer.layers.0"),
        (5, "reducer.layers.1"),
        (11, "tail.5"),
    ):
        qkv = source[f"blocks.{index}.attn.qkv.weight"]
        assert torch.equal(ours[f"{place}.attn.q.weight"], qkv[:384])
        assert torch.equal(ours[f"{place}.attn.kv.weight"], qkv[384:])
        assert torch.equal(ours[f"{place}.mlp.fc1.bias"], source[f"blocks.{index}.mlp.fc1.bias"])
    for name in ours:
        if name.startswith(("reducer.pool.", "reducer.global_centres")):
            assert torch.equal(ours[name], fresh[name])
    assert torch.equal(ours["head.weight"], source["head.weight"])


@pytest.mark.parametrize(
    ("position", "names"),
    [
        ("learned", ["reducer.position"]),
        ("conv", ["reducer.conv_pos.bias", "reducer.conv_pos.weight"]),
        ("relative", ["tail.0.attn.relative_position_bias_table"]),
    ],
)
def test_positions_of_semantic_tokens_are_not_in_deit(position: str, names: list[str]) -> None:
    source = deit().state_dict()
    model = tiny(token_position=position)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(from_deit(source, model))
    ours = model.state_dict()
    assert all(torch.equal(ours[name], fresh[name]) for name in names)
    assert torch.equal(ours["tail.0.mlp.fc1.weight"], source["blocks.4.mlp.fc1.weight"])
    missing, unexpected = model.load_state_dict(convert(source, "semantic", base_depth=2), strict=False)
    assert set(names) <= set(missing) and not unexpected
    with pytest.raises(CheckpointMismatch) as error:
        revert(ours, layout="deit")
    assert "deit layout has no place" in str(error.value) and names[0].removeprefix("tail.0.") in str(error.value)
    if position != "relative":  # a table has its name in the reference's layers
        with pytest.raises(CheckpointMismatch, match=f"reference layout has no place(.|\n)*{names[0]}"):
            revert(ours)


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_positions_of_semantic_tokens_are_not_in_swin(stem: str) -> None:
    sizes = dict(img_size=64, patch_size=2, window_size=4, num_classes=5, embed_dim=8, depths=(1, 1, 6, 1))
    heads = dict(num_heads=(1, 2, 2, 4))
    source = timm.create_model("swin_tiny_patch4_window7_224", **sizes, **heads).state_dict()
    model = STViTSwin(**sizes, **heads, per_window=2, stem=stem, learned_pos=True, use_conv_pos=True, relative_pos=True)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(convert(source, model))
    ours = model.state_dict()
    unit = "stages.2.units.0"
    own = [n for n in ours if n.startswith((f"{unit}.generator.position", f"{unit}.generator.conv_pos"))]
    own += [n for n in ours if n.startswith(f"{unit}.semantic.") and n.endswith("relative_position_bias_table")]
    assert len(own) == 3 + 2
    assert all(torch.equal(ours[name], fresh[name]) for name in own)
    assert torch.equal(ours[f"{unit}.semantic.0.mlp.fc1.weight"], source["layers.2.blocks.4.mlp.fc1.weight"])
    with pytest.raises(CheckpointMismatch, match=r"official layout(.|\n)*generator\.position"):
        revert(ours)


def test_deit_base_layers_see_the_image_as_deit_does() -> None:
    source = deit(class_token=False, global_pool="avg", fc_norm=False)
    model = tiny().eval()
    model.load_state_dict(from_deit(source.state_dict(), model))
    images = torch.randn(2, 3, 32, 32)
    base, _ = model.forward_base(images)
    expected = source.patch_embed(images) + source.pos_embed
    torch.testing.assert_close(base, source.blocks[:2](expected), rtol=1e-4, atol=1e-5)


def test_deit_converts_without_a_model_at_hand() -> None:
    source = deit().state_dict()
    model = tiny(tokens="all", class_token=True)
    model.load_state_dict(convert(source, base_depth=2))
    assert same(dict(model.state_dict()), from_deit(source, model))
    start = convert(source, "semantic", base_depth=2)
    missing, unexpected = tiny().load_state_dict(start, strict=False)
    assert not unexpected
    assert all(name.startswith(("reducer.pool.", "reducer.global_centres")) for name in missing)
    assert torch.equal(start["pos_embed"], source["pos_embed"][:, 1:])
    del source["blocks.1.norm2.bias"]
    with pytest.raises(CheckpointMismatch, match=r"missing:\n    base.1.norm2.bias"):
        convert(source, "semantic", base_depth=2)


def test_deit_for_another_image_size_and_other_classes() -> None:
    source = deit(img_size=24).state_dict()
    model = tiny(num_classes=3)
    with pytest.raises(CheckpointMismatch, match=r"load_head=False(.|\n)*head.weight: \(5, 32\)"):
        from_deit(source, model)
    head = model.head.weight.clone()
    model.load_state_dict(from_deit(source, model, load_head=False))
    assert torch.equal(model.head.weight, head)
    assert model.pos_embed.shape == (1, 64, 32)


def test_registers_are_no_class_token() -> None:
    """They are at work in the layers, so a model without them is not the start that was meant."""
    source = deit(reg_tokens=2).state_dict()
    with pytest.raises(CheckpointMismatch, match="reg_token"):
        from_deit(source, tiny())
    model = tiny(reg_tokens=2)
    model.load_state_dict(from_deit(source, model))
    assert torch.equal(model.pos_embed, source["pos_embed"][:, 1:])


def test_deit_layouts_of_models_with_more_tokens_go_there_and_back() -> None:
    for options in (
        dict(reg_tokens=1, distilled=True),
        dict(reg_tokens=3, no_embed_class=True, fc_norm=True),
        dict(pre_norm=True, final_norm=False),
    ):
        model = tiny(tokens="all", class_token=True, **options)
        theirs = revert(model.state_dict(), layout="deit")
        assert ("dist_token" in theirs) == ("distilled" in options)
        assert same(convert(theirs, model), dict(model.state_dict()))
        assert same(convert(theirs, "vit", base_depth=2), dict(model.state_dict()))


# ------------------------------------------------------------------------------------ reference layout


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(pool="max"),
        dict(pool="weighted", use_global=False),
        dict(layer_scale=0.1, qkv_bias=False, mlp_ratio=2.0),
        dict(stem="conv"),
        dict(tokens="all", class_token=True),
        dict(num_classes=0),
        dict(base_depth=0, stgm_depth=3),
        dict(token_position="relative"),
        dict(token_position="relative", use_global=False, pool="max", token_grid=3),
    ],
    ids=str,
)
def test_models_go_to_the_reference_layout_and_back(options: dict[str, object]) -> None:
    model = tiny(**options)
    ours = model.state_dict()
    theirs = revert(ours)
    assert not [name for name in theirs if re.match(r"base|reducer|tail|stem|.*gamma", name)]
    assert {f"blocks.{i}.norm1.weight" for i in range(5)} <= theirs.keys()
    assert same(convert(theirs, model), dict(ours))
    depths = {name: options[name] for name in ("base_depth", "stgm_depth") if name in options}
    assert same(convert(theirs, **({"base_depth": 2} | depths)), dict(ours))


@pytest.mark.parametrize(
    "piece",
    [
        lambda: Block(8, 2, layer_scale=0.1, relative_window=3),
        lambda: build_pool("weighted_offset", 8, (2, 2)),
        lambda: ConvStem(4, 3, 8),
    ],
)
def test_pieces_go_to_the_reference_layout_and_back(piece: object) -> None:
    module = piece()
    ours = module.state_dict()
    theirs = revert(ours)
    assert theirs.keys() != ours.keys()
    assert same(convert(theirs, module), dict(ours))


def test_computed_buffers_are_dropped_and_counters_may_be_missing() -> None:
    block = Block(8, 2, relative_window=3)
    extra = {"attn.relative_position_index": torch.zeros(9, 9), "attn_mask": torch.zeros(4, 9, 9)}
    assert same(convert(block.state_dict() | extra, block), dict(block.state_dict()))
    stem = ConvStem(4, 3, 8)
    theirs = {name: value for name, value in revert(stem.state_dict()).items() if "num_batches" not in name}
    assert same(convert(theirs, stem), dict(stem.state_dict()))


def test_everything_that_does_not_fit_is_listed() -> None:
    model = tiny()
    theirs = revert(model.state_dict())
    del theirs["blocks.3.mlp.fc1.bias"], theirs["global_center"]
    theirs["blocks.5.mlp.fc1.bias"] = torch.zeros(128)
    theirs["note"] = torch.zeros(1)
    theirs["norm.weight"] = torch.ones(31)
    with pytest.raises(CheckpointMismatch) as error:
        convert(theirs, model)
    text = str(error.value)
    missing, rest = text.split("unexpected:")
    unexpected, shape = rest.split("other shape:")
    assert "reducer.layers.1.mlp.fc1.bias" in missing and "reducer.global_centres" in missing
    assert "tail.1.mlp.fc1.bias" in unexpected and "note" in unexpected
    assert "norm.weight: (31,) in the checkpoint, (32,) in the model" in shape


def test_unknown_targets_layouts_and_states_are_refused() -> None:
    with pytest.raises(ValueError, match="'vit', 'semantic'"):
        convert({}, "resnet")
    with pytest.raises(CheckpointMismatch, match="pos_embed"):
        convert({"conv1.weight": torch.zeros(1)}, "vit")
    with pytest.raises(ValueError, match="reference, deit, official, timm"):
        revert({}, layout="torch")
    with pytest.raises(CheckpointMismatch, match="global_center"):
        revert(tiny().state_dict(), layout="deit")


def test_relative_bias_resizes_between_windows() -> None:
    table = torch.randn(13 * 13, 3)
    assert resize_relative_bias(table, 7) is table
    bigger = resize_relative_bias(table, 12)
    assert bigger.shape == (23 * 23, 3)
    # The centre of both tables is the offset (0, 0); on odd sides bicubic sampling keeps it.
    torch.testing.assert_close(bigger[264], table[84])
    with pytest.raises(ValueError, match="square window"):
        resize_relative_bias(torch.randn(12, 3), 7)


# ------------------------------------------------------------------------------------ losses


def test_losses_equal_timm() -> None:
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    soft = mixup_target(labels, 10, lam=0.3, smoothing=0.1)
    torch.testing.assert_close(soft_target_cross_entropy(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    torch.testing.assert_close(
        label_smoothing_cross_entropy(logits, labels, 0.2), LabelSmoothingCrossEntropy(0.2)(logits, labels)
    )
    torch.testing.assert_close(classification_loss(logits, soft), soft_target_cross_entropy(logits, soft))
    torch.testing.assert_close(
        classification_loss(logits, labels, 0.1), label_smoothing_cross_entropy(logits, labels, 0.1)
    )
    torch.testing.assert_close(classification_loss(logits, labels, 0.0), F.cross_entropy(logits, labels))


def test_labels_are_smoothed_by_a_tenth_unless_told_otherwise() -> None:
    """The recipe's 0.1: of ten classes, the right one keeps 0.91."""
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    target = torch.full((6, 10), 0.01).scatter(1, labels[:, None], 0.91)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, labels), expected)
    torch.testing.assert_close(classification_loss(logits, labels), expected)
    trainer = ClassificationTrainer(nn.Identity())
    torch.testing.assert_close(trainer.losses({"image": logits, "label": labels})["loss_cls"], expected)


def test_losses_are_float32_and_finite_at_extremes() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        soft = soft_target_cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]]))
        smooth = label_smoothing_cross_entropy(logits, torch.tensor([1]))
    assert soft.dtype == smooth.dtype == torch.float32
    assert soft.item() == pytest.approx(600, rel=1e-2)
    (soft + smooth).backward()
    assert logits.grad.isfinite().all()

    logits, labels = torch.randn(4, 1000).bfloat16(), torch.randint(1000, (4,))
    target = torch.rand(4, 1000).softmax(-1).bfloat16()
    expected = -(target.float() * logits.float().log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(soft_target_cross_entropy(logits, target), expected)
    expected = -logits.float().log_softmax(-1)[range(4), labels].mean()
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, labels, 0.0), expected)


def test_soft_targets_must_have_the_logits_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        soft_target_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
