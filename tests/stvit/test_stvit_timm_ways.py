"""timm's habits on our models: pooling, classifiers, tokens on the way, and files of weights as wrappers leave them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from test_stvit_timm import OWN_DEIT, OWN_SWIN, overlay, swin, vit
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from core.checkpoint.weights import load_weights
from stvit.checkpoint import CheckpointMismatch, convert, from_deit
from stvit.models import SemanticTokenViT, SwinTransformer
from tests.stvit.subjects import DEAR, enlivened

NAMES = {
    "stvit_deit_tiny_patch16_224": (OWN_DEIT, 32, 32),
    "stvit_swin_tiny_window7_224": (OWN_SWIN | dict(key_windows=(6, 6)), 128, 128),
    "stvit_r_swin_tiny_window7_224": (OWN_SWIN | dict(key_windows=(6, None, None), shortcut=True), 128, 128),
}
each_name = pytest.mark.parametrize("name", NAMES)


def lively(model: nn.Module) -> nn.Module:
    return enlivened(model).eval()


def create(name: str, **options: object) -> tuple[nn.Module, Tensor]:
    own, size, _ = NAMES[name]
    model = lively(timm.create_model(name, **(own | dict(num_classes=3) | options)))
    return model, torch.randn(2, options.get("in_chans", 3), size, size)


# ------------------------------------------------------------------------------------ pooling and classifier


@each_name
def test_models_without_classifier_and_pooling_give_tokens(name: str) -> None:
    model, images = create(name)
    tokens = model.forward_features(images)
    assert tokens.shape[:2] == (2, 16 if "_r_" in name else 4) and tokens.shape[2] == NAMES[name][2]
    for pool, pooled in {
        "avg": tokens.mean(1),
        "max": tokens.amax(1),
        "avgmax": (tokens.amax(1) + tokens.mean(1)) / 2,
        "": tokens,
    }.items():
        model.reset_classifier(0, pool)
        assert model.num_classes == 0 and model.global_pool == pool
        torch.testing.assert_close(model(images), pooled)
        model.reset_classifier(3)
        torch.testing.assert_close(model(images), model.get_classifier()(pooled))
    bare, images = create(name, num_classes=0, global_pool="")
    torch.testing.assert_close(bare(images), bare.forward_features(images))
    for pool, message in (("token", "class token"), ("map", "attention pooling"), ("mean", "unknown global_pool")):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(3, pool)


@pytest.mark.parametrize("name", DEAR)
def test_an_empty_batch_gives_an_empty_result(name: str) -> None:
    model = DEAR[name].made()
    images = DEAR[name].inputs(1)[0]
    for mode in (True, False):
        model.train(mode)
        some, none = model(images if not mode else torch.cat([images, images])), model(images[:0])
        some, none = ((one,) if isinstance(one, Tensor) else one for one in (some, none))
        assert [one.shape[1:] for one in some] == [one.shape[1:] for one in none]
        assert all(len(one) == 0 for one in none)


def test_a_vit_without_final_norm_and_with_one_behind_pooling() -> None:
    options = dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, base_depth=1, token_grid=2)
    bare = lively(SemanticTokenViT(**options, final_norm=False, num_classes=0))
    images, seen = torch.randn(2, 3, 32, 32), []
    bare.tail[-1].register_forward_hook(lambda layer, given, tokens: seen.append(tokens))
    torch.testing.assert_close(bare(images), seen[0].mean(1))
    assert "norm.weight" not in bare.state_dict()
    late = lively(SemanticTokenViT(**options, fc_norm=True, num_classes=0))
    torch.testing.assert_close(late(images), late.fc_norm(late.forward_features(images).mean(1)))


# ------------------------------------------------------------------------------------ on the way


@each_name
def test_features_only_gives_the_maps_of_forward_intermediates(name: str) -> None:
    whole, images = create(name)
    features, _ = create(name, features_only=True, out_indices=(1, 2))
    features.model.load_state_dict(whole.state_dict(), strict=False)
    wanted = whole.forward_intermediates(images, [1, 2], intermediates_only=True)
    for got, expected, channels in zip(features(images), wanted, features.feature_info.channels(), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.shape[1] == channels
    assert len(features.state_dict()) < len(whole.state_dict()), "layers behind the last map are left out"
    named = whole.forward_intermediates(images, [1, 2], output_dict=True)
    assert set(named) == {"image_features", "image_intermediates"}
    torch.testing.assert_close(named["image_features"], whole.forward_features(images))
    assert all(torch.equal(a, b) for a, b in zip(named["image_intermediates"], wanted, strict=True))


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_layers_behind_those_asked_for_are_pruned(last: int) -> None:
    model, images = create("stvit_deit_tiny_patch16_224")
    layers = model.get_intermediate_layers(images, [last])
    expected = layers[0]
    assert torch.equal(model.get_intermediate_layers(images, [last], reshape=True)[0].flatten(2).mT, expected)
    assert model.prune_intermediate_layers([last]) == [last]
    assert len(model.base) + len(model.reducer.layers) + len(model.tail) == last + 1
    torch.testing.assert_close(model.get_intermediate_layers(images, 1)[0], expected)
    torch.testing.assert_close(model(images), model.norm(expected))


@each_name
def test_sizes_and_options_by_timms_names(name: str) -> None:
    model, _ = create(name, init_values=0.25, dynamic_img_size=True, strict_img_size=False, proj_drop_rate=0.3)
    assert all(part.init_values == 0.25 for part in model.modules() if isinstance(part, LayerScale))
    assert any(isinstance(part, LayerScale) for part in model.modules())
    dropouts = [m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and n.endswith("proj_drop")]
    assert set(dropouts) == {0.3} and model.head_drop.p == 0.0 and model.in_chans == 3
    images = torch.randn(1, 3, 96, 64)
    before = model(images)
    model.set_input_size((96, 64))
    assert model.img_size == (96, 64) and model.grid == model.stem.grid(96, 64)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="patch_size=5"):
        model.set_input_size(patch_size=5)
    with pytest.raises(ValueError, match="patch_drop_rate does not go with"):
        create(name, patch_drop_rate=0.1)


# ------------------------------------------------------------------------------------ files of weights

PREFIXES = ("module.", "_orig_mod.", "_orig_mod.module.", "model.", "backbone.", "encoder.", "module.model.encoder.")


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def read(content: dict, model: nn.Module) -> dict[str, Tensor]:
    return (from_deit if isinstance(model, SemanticTokenViT) else convert)(content, model)


def entry_points(folder: Path, name: str) -> dict[str, Callable[[dict], dict[str, Tensor]]]:
    """Ways of loading a file's content -> the weights that a model then has."""
    own = NAMES[name][0]
    file = folder / "w.pth"

    def written(content: dict) -> str:
        torch.save(content, file)
        return str(file)

    return {
        "pretrained": lambda content: timm.create_model(
            name, **own, **overlay(written(content)), num_classes=3
        ).state_dict(),
        "checkpoint_path": lambda content: timm.create_model(
            name, **own, num_classes=3, checkpoint_path=written(content)
        ).state_dict(),
        "convert": lambda content: read(content, create(name)[0]),
    }  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["ours", "theirs"])
@pytest.mark.parametrize("name", ["stvit_deit_tiny_patch16_224", "stvit_r_swin_tiny_window7_224"])
def test_prefixes_of_wrappers_and_averages_in_every_entry_point(
    name: str, layout: str, prefix: str, tmp_path: Path
) -> None:
    source = create(name)[0] if layout == "ours" else lively(vit() if "deit" in name else swin())
    state = source.state_dict()
    shown = ("tail.0.mlp.fc1.weight", "blocks.3.mlp.fc1.weight") if "deit" in name else (
        "stages.3.blocks.0.mlp.fc1.weight", "layers.3.blocks.0.mlp.fc1.weight"
    )  # fmt: skip
    expected = state[shown[layout == "theirs"]]
    old = {key: torch.zeros_like(value) for key, value in state.items()}
    contents = [
        below(prefix, state),
        {"state_dict": below(prefix, old), "state_dict_ema": below(prefix, state), "args": argparse.Namespace(a=1)},
        {"model": below(prefix, old), "model_ema": below(prefix, state)},
    ]
    for way, load in entry_points(tmp_path, name).items():
        for content in contents[: 1 if way == "pretrained" else 3]:
            got = load(content)
            assert torch.equal(got[shown[0]], expected), way


@pytest.mark.parametrize("prefix", PREFIXES)
def test_load_from_takes_them_too(prefix: str, tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = create("stvit_deit_tiny_patch16_224")[0]
            self.other = nn.Linear(2, 2)

    source, model = Holder(), Holder()
    torch.save(below(prefix, source.network.state_dict()), tmp_path / "w.pth")
    assert "into network" in load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.network.head.weight, source.network.head.weight)
    averaged = AveragedModel(source.network).state_dict()
    torch.save({"state_dict": {}, "state_dict_ema": averaged}, tmp_path / "w.pth")
    model = Holder()
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.network.head.weight, source.network.head.weight)


def test_what_lies_beside_a_wrapped_model_is_named() -> None:
    state = below("model.", vit().state_dict()) | {"criterion.weight": torch.ones(2)}
    with pytest.raises(CheckpointMismatch, match=r"below 'model\.'(.|\n)*criterion\.weight"):
        convert(state, create("stvit_deit_tiny_patch16_224")[0])


def test_a_rectangular_and_a_distilled_checkpoint_start_a_model() -> None:
    options = OWN_DEIT | dict(img_size=(32, 24), num_classes=3)
    source = lively(vit(img_size=(32, 24)))  # 48 tokens and one: 49 is a square, too
    model = SemanticTokenViT(**options)
    model.load_state_dict(from_deit(source.state_dict(), model))
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:])
    distilled = lively(timm.create_model("deit_tiny_distilled_patch16_224", **OWN_DEIT_TIMM))
    model = SemanticTokenViT(**OWN_DEIT, num_classes=3)
    model.load_state_dict(from_deit(distilled.state_dict(), model))
    assert torch.equal(model.pos_embed, distilled.pos_embed[:, 2:])
    torch.testing.assert_close(model.head.weight, (distilled.head.weight + distilled.head_dist.weight) / 2)


OWN_DEIT_TIMM = dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=3)


# ------------------------------------------------------------------------------------ absolute positions of Swin


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_absolute_positions_of_swin(size: tuple[int, int]) -> None:
    """Added behind the stem; on another map resampled bicubically, as Swin's detection code does."""
    options = dict(img_size=64, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, num_classes=3)
    plain, model = lively(SwinTransformer(**options)), SwinTransformer(**options, ape=True).eval()
    position = torch.randn(1, 256, 16)
    official = timm_swin_state(plain) | {"absolute_pos_embed": position}
    model.load_state_dict(convert(official, model))
    images, maps = torch.randn(1, 3, *size), position.reshape(1, 16, 16, 16).permute(0, 3, 1, 2)
    if size != (64, 64):
        maps = nn.functional.interpolate(maps, (size[0] // 4, size[1] // 4), mode="bicubic")
    stem = plain.stem.forward
    plain.stem.forward = lambda x: stem(x) + maps
    torch.testing.assert_close(model(images), plain(images))
    # The same file into a model of that size, and in OpenMMLab's form.
    for form in (position, position.reshape(1, 16, 16, 16).permute(0, 3, 1, 2)):
        fitted = SwinTransformer(**(options | dict(img_size=size)), ape=True).eval()
        fitted.load_state_dict(convert(official | {"absolute_pos_embed": form}, fitted))
        torch.testing.assert_close(fitted(images), plain(images))
    assert "absolute_pos_embed" in model.no_weight_decay()
    assert torch.equal(convert(official)["absolute_pos_embed"], position)
    frozen = SwinTransformer(**options, ape=True, frozen_stages=1)
    assert not frozen.absolute_pos_embed.requires_grad


def timm_swin_state(model: SwinTransformer) -> dict[str, Tensor]:
    from stvit.checkpoint import revert

    return revert(model.state_dict(), layout="official")


@pytest.mark.parametrize("name", list(NAMES)[1:])
def test_other_models_with_windows_have_them_too(name: str) -> None:
    model, images = create(name, ape=True)
    before = model(images)
    with torch.no_grad():
        model.absolute_pos_embed.add_(torch.randn_like(model.absolute_pos_embed))
    assert not torch.allclose(model(images), before)
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 3)
