"""timm's door: `timm.create_model` with our names, weights of plain timm checkpoints, maps, export."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import SwinTransformer as TimmSwin
from timm.models import VisionTransformer
from torch import Tensor, nn

from stvit.checkpoint import revert
from stvit.models import LVViT, SemanticTokenViT, STViTRSwin, STViTSwin

DEIT = dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2)
SWIN = dict(img_size=64, embed_dim=16, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2), window_size=4)
OWN_DEIT = DEIT | dict(base_depth=1, token_grid=2)
OWN_SWIN = SWIN | dict(per_window=2)
# Published sizes: parameters with 1000 classes.
NAMES = {
    "stvit_deit_tiny_patch16_224": (SemanticTokenViT, 5.762e6),
    "stvit_deit_small_patch16_224": (SemanticTokenViT, 22.213e6),
    "stvit_deit_base_patch16_224": (SemanticTokenViT, 87.187e6),
    "lvvit_small_patch16_224": (LVViT, 26.152e6),
    "lvvit_medium_patch16_224": (LVViT, 55.831e6),
    "stvit_lvvit_small_patch16_224": (LVViT, 25.937e6),
    "stvit_lvvit_medium_patch16_224": (LVViT, 55.610e6),
    "stvit_swin_tiny_window7_224": (STViTSwin, None),
    "stvit_swin_small_window7_224": (STViTSwin, None),
    "stvit_swin_base_window7_224": (STViTSwin, None),
    "stvit_r_swin_tiny_window7_224": (STViTRSwin, 28_320_214),
    "stvit_r_swin_small_window7_224": (STViTRSwin, 49_625_518),
    "stvit_r_swin_base_window7_224": (STViTRSwin, 87_812_336),
}
# LV-ViT's share of the image, of its authors' configurations.
CROPS = {name: 0.9 if "small" in name else 1.0 for name in NAMES if "lvvit" in name}
each_name = pytest.mark.parametrize("name", NAMES)


def create(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def vit(**options: object) -> VisionTransformer:
    return VisionTransformer(**(DEIT | dict(num_classes=3) | options)).eval()


def swin(**options: object) -> TimmSwin:
    return TimmSwin(**(SWIN | dict(num_classes=3) | options)).eval()


def saved(model: nn.Module, folder: Path) -> str:
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def overlay(file: str, **more: object) -> dict[str, object]:
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=file, num_classes=3) | more)


# ------------------------------------------------------------------------------------ every name


def test_these_are_the_names() -> None:
    assert {*timm.list_models("stvit*"), *timm.list_models("lvvit*")} == set(NAMES)
    assert set(timm.list_pretrained("stvit*")) == {
        "stvit_r_swin_small_window7_224.in1k",
        "stvit_r_swin_base_window7_224.in1k",
    }


@each_name
def test_every_name_makes_its_model(name: str) -> None:
    kind, parameters = NAMES[name]
    model = create(name)
    assert type(model) is kind
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, abs=500)
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == CROPS.get(name, 0.875)
    # timm finds the first convolution and the classifier by these names.
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    classifiers, made = model.pretrained_cfg["classifier"], model.get_classifier()
    classifiers, made = ((classifiers,), (made,)) if isinstance(classifiers, str) else (classifiers, made)
    assert all(model.get_submodule(one) is part for one, part in zip(classifiers, made, strict=True))
    changed = create(name, num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2)
    assert changed(torch.empty(2, 1, 224, 224, device="meta")).shape == (2, 7)
    changed.reset_classifier(3)
    assert changed.num_classes == 3 and changed(torch.empty(2, 1, 224, 224, device="meta")).shape == (2, 3)
    changed.reset_classifier(0)
    features = changed.forward_features(torch.empty(2, 1, 224, 224, device="meta"))
    assert changed.forward_head(features, pre_logits=True).shape == (2, changed.num_features)


@each_name
def test_every_name_gives_maps_on_the_way(name: str) -> None:
    model = create(name)
    final, maps = model.forward_intermediates(torch.empty(1, 3, 224, 224, device="meta"))
    assert len(maps) == len(model.feature_info) and final.shape[-1] == model.num_features
    for info, found in zip(model.feature_info, maps, strict=True):
        side = round(224 / info["reduction"])
        assert found.shape == (1, info["num_chs"], side, side), info
        model.get_submodule(info["module"])


# ------------------------------------------------------------------------------------ weights


def test_a_plain_deit_file_starts_stvit(tmp_path: Path) -> None:
    source = vit()
    file = saved(source, tmp_path)
    model = timm.create_model("stvit_deit_tiny_patch16_224", **OWN_DEIT, **overlay(file), num_classes=3)
    third = source.blocks[2]  # the second generation layer
    assert torch.equal(model.reducer.layers[1].attn.q.weight, third.attn.qkv.weight[:32])
    assert torch.equal(model.reducer.layers[1].attn.kv.bias, third.attn.qkv.bias[32:])
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:])
    assert torch.equal(model.head.weight, source.head.weight)
    # As every token with all its layers, it is the plain model.
    full = timm.create_model(
        "stvit_deit_tiny_patch16_224", **DEIT, **overlay(file), num_classes=3, tokens="all", class_token=True,
        base_depth=1,
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(full(images), source(images), rtol=1e-4, atol=1e-4)


def test_another_number_of_classes_and_channels(tmp_path: Path) -> None:
    source = vit()
    file = saved(source, tmp_path)
    model = timm.create_model("stvit_deit_tiny_patch16_224", **OWN_DEIT, **overlay(file), num_classes=5, in_chans=1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    torch.testing.assert_close(model.stem.proj.weight, source.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    assert torch.equal(model.base[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert "state_dict" not in model.pretrained_cfg


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("name", ["stvit_swin_tiny_window7_224", "stvit_r_swin_tiny_window7_224"])
def test_a_plain_swin_file_starts_the_windowed_models(name: str, stem: str, tmp_path: Path) -> None:
    source = swin()
    windows = dict(key_windows=(6, 6)) if "_r_" not in name else dict(key_windows=(6, None, None))
    model = timm.create_model(name, **OWN_SWIN, **windows, **overlay(saved(source, tmp_path)), num_classes=3, stem=stem)
    assert torch.equal(model.stages[1].downsample.reduction.weight, source.layers[1].downsample.reduction.weight)
    unit, third = model.stages[2].units[0], source.layers[2].blocks
    first = len(unit.base)
    assert torch.equal(unit.base[0].attn.qkv.weight, third[0].attn.qkv.weight)
    assert torch.equal(unit.generator.layers[0].attn.q.weight, third[first].attn.qkv.weight[:64])
    assert torch.equal(unit.semantic[0].mlp.fc2.weight, third[first + 2].mlp.fc2.weight)
    assert torch.equal(model.head.weight, source.head.fc.weight)
    if stem == "patch":
        assert torch.equal(model.stem.proj.weight, source.patch_embed.proj.weight)
    other = timm.create_model(
        name, **OWN_SWIN, **windows, **overlay(saved(source, tmp_path)), num_classes=9, in_chans=1, stem=stem
    )
    assert other(torch.randn(1, 1, 64, 64)).shape == (1, 9)


def test_released_files_are_read_with_all_they_hold(tmp_path: Path) -> None:
    """The layout of the release, in a file beside an optimizer's state, for the classifier and for maps."""
    options = OWN_SWIN | dict(key_windows=(6, None, None))
    source = timm.create_model("stvit_r_swin_tiny_window7_224", **options, num_classes=3).eval()
    torch.save({"model": revert(source.state_dict()), "optimizer": {"step": 1}, "epoch": 299}, tmp_path / "w.pth")
    file = str(tmp_path / "w.pth")
    model = timm.create_model("stvit_r_swin_tiny_window7_224", **options, **overlay(file), num_classes=3).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), source(images))
    maps = timm.create_model("stvit_r_swin_tiny_window7_224", **options, **overlay(file), features_only=True).eval()
    for got, wanted in zip(maps(images), source.forward_intermediates(images, intermediates_only=True), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_file_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    file = saved(vit(depth=5), tmp_path)
    with pytest.raises(ValueError, match=r"tail\.1\.norm1\.weight"):
        timm.create_model("stvit_deit_tiny_patch16_224", **OWN_DEIT, **overlay(file), num_classes=3)


# ------------------------------------------------------------------------------------ maps, export


@pytest.mark.compile
def test_features_only_models_give_maps_of_the_stages() -> None:
    model = timm.create_model(
        "stvit_r_swin_tiny_window7_224", **OWN_SWIN, features_only=True, out_indices=(1, 3)
    ).eval()  # fmt: skip
    assert model.feature_info.channels() == [32, 128] and model.feature_info.reduction() == [8, 32]
    images = torch.randn(1, 3, 96, 75)
    maps: list[Tensor] = model(images)
    assert [tuple(m.shape) for m in maps] == [(1, 32, 12, 10), (1, 128, 3, 3)]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
        exported = torch.export.export(model, (images,)).module()(images)
    for got in (compiled, exported):
        for found, wanted in zip(got, maps, strict=True):
            torch.testing.assert_close(found, wanted)


def test_vit_intermediates_are_the_tokens_after_each_layer() -> None:
    model = timm.create_model("stvit_deit_tiny_patch16_224", **OWN_DEIT, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    for layer in [*model.base, *model.reducer.layers, *model.tail]:
        layer.register_forward_hook(lambda layer, given, tokens: seen.append(tokens))
    final, tokens = model.forward_intermediates(images, output_fmt="NLC")
    assert len(seen) == 4 and [t.shape[1] for t in tokens] == [64, 4, 4, 4]
    for got, wanted in zip(tokens, seen, strict=True):
        assert torch.equal(got, wanted)
    torch.testing.assert_close(model.forward_head(final), model(images))
    maps = model.forward_intermediates(images, indices=[0, -1], intermediates_only=True, norm=True)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 8, 8), (2, 32, 2, 2)]
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), final)
    pairs = model.forward_intermediates(images, 1, return_prefix_tokens=True, intermediates_only=True)
    assert len(pairs) == 1 and pairs[0][1].shape == (2, 0, 32)
    early, _ = model.forward_intermediates(images, indices=[1], stop_early=True)
    torch.testing.assert_close(early, model.norm(tokens[1]))
    with pytest.raises(ValueError, match="'NCHW'"):
        model.forward_intermediates(images, output_fmt="NHWC")
    merging = timm.create_model("stvit_deit_tiny_patch16_224", **OWN_DEIT, tokens="tome")
    with pytest.raises(ValueError, match="leave the grid"):
        merging.forward_intermediates(images)
