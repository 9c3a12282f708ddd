"""LV-ViT: the authors' sizes, names and equations; semantic tokens on it; what its trainer adds."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from stvit import TokenLabelTrainer
from stvit.checkpoint import CheckpointMismatch, convert, from_deit
from stvit.models import LVViT, SemanticTokenViT, lvvit_medium, lvvit_small, stvit_lvvit_small
from stvit.models.block import Block
from stvit.models.reducers import count_macs
from stvit.models.stem import HalfConvStem
from tests.gradients import unreached

TINY = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=4, num_heads=2)


def tiny(**options: object) -> LVViT:
    torch.manual_seed(0)
    return LVViT(**(TINY | options)).eval()


def official(dim: int = 24, depth: int = 4, patch: int = 8, grid: int = 4, classes: int = 5, ratio: int = 3) -> dict:
    """Random weights under the authors' names, as `LV_ViT(p_emb="4_2", return_dense=True)` has them."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(max(1, math.prod(shape[1:])))

    state = {"cls_token": draw(1, 1, dim), "pos_embed": draw(1, 1 + grid**2, dim)}
    for i, (chans, kernel) in enumerate([(3, 7), (64, 3), (64, 3)], start=1):
        state[f"patch_embed.conv{i}.weight"] = draw(64, chans, kernel, kernel)
        state |= {f"patch_embed.bn{i}.{name}": draw(64) for name in ("weight", "bias", "running_mean")}
        state[f"patch_embed.bn{i}.running_var"] = draw(64).square() + 0.5
        state[f"patch_embed.bn{i}.num_batches_tracked"] = torch.tensor(3)
    state["patch_embed.proj.weight"] = draw(dim, 64, patch // 2, patch // 2)
    state["patch_embed.proj.bias"] = draw(dim)
    for i in range(depth):
        state |= {f"blocks.{i}.{norm}.{part}": draw(dim) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        state[f"blocks.{i}.attn.qkv.weight"] = draw(3 * dim, dim)
        for name, out, into in (("attn.proj", dim, dim), ("mlp.fc1", ratio * dim, dim), ("mlp.fc2", dim, ratio * dim)):
            state |= {f"blocks.{i}.{name}.weight": draw(out, into), f"blocks.{i}.{name}.bias": draw(out)}
    state |= {"norm.weight": draw(dim), "norm.bias": draw(dim)}
    for head in ("head", "aux_head"):
        state |= {f"{head}.weight": draw(classes, dim), f"{head}.bias": draw(classes)}
    return state


def by_hand(state: dict, images: Tensor, heads: int = 2, depth: int = 4, patch: int = 8) -> Tensor:
    """The authors' equations, on their names: `head(class token) + max over tokens of aux_head / 2`."""
    w = state

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    x = images
    for i, (stride, pad) in enumerate([(2, 3), (1, 1), (1, 1)], start=1):
        x = F.conv2d(x, w[f"patch_embed.conv{i}.weight"], None, stride, pad)
        bn = [w[f"patch_embed.bn{i}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *bn).relu()
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], patch // 2).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for i in range(depth):
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).chunk(3, dim=-1)
        q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k, v))
        taken = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(f"blocks.{i}.attn.proj", taken.transpose(1, 2).flatten(2)) / 2
        x = x + linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))) / 2
    x = norm("norm", x)
    return linear("head", x[:, 0]) + 0.5 * linear("aux_head", x[:, 1:]).max(dim=1).values


def test_sizes_are_the_authors() -> None:
    """README: 26.15 M and 55.83 M. The classifier of tokens is 384 x 1000 + 1000 of the former."""
    with torch.device("meta"):
        small, medium, semantic = lvvit_small(), lvvit_medium(), stvit_lvvit_small()
        bare = lvvit_small(token_head=False)
    count = [sum(p.numel() for p in model.parameters()) for model in (bare, small, medium)]
    assert [round(value / 1e6, 2) for value in count] == [25.77, 26.15, 55.83] and count[1] - count[0] == 385_000
    assert count_macs(small, (224, 224)) / 1e9 == pytest.approx(6.551, abs=1e-3)
    assert count_macs(semantic, (224, 224)) / 1e9 == pytest.approx(3.661, abs=1e-3)
    assert (small.remaining_tokens(), semantic.remaining_tokens()) == (196, 36)
    assert semantic.aux_head is None and semantic.cls_token is None


def test_published_weights_give_what_the_equations_give() -> None:
    state, images = official(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = tiny()
    model.load_state_dict(convert({"model": state}, model), strict=True)
    torch.testing.assert_close(model(images), by_hand(state, images), atol=1e-4, rtol=1e-4)


def test_semantic_tokens_start_from_published_weights() -> None:
    """Layers are those of the file; class token and classifier of tokens have no place, pooling stays."""
    state, model = official(), tiny(tokens="semantic", base_depth=1, token_grid=2)
    fresh = model.reducer.global_centres.clone()
    model.load_state_dict(from_deit(state, model), strict=True)
    third = 24
    assert torch.equal(model.base[0].attn.q.weight, state["blocks.0.attn.qkv.weight"][:third])
    assert torch.equal(model.reducer.layers[1].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 1:])
    assert torch.equal(model.stem.stages[2].norm.running_var, state["patch_embed.bn3.running_var"])
    assert torch.equal(model.reducer.global_centres, fresh)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert model.token_maps(torch.randn(1, 3, 32, 32)).shape == (1, 4, 4, 4)


def test_weights_without_a_module_are_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="number of heads"):
        convert(official(), "vit")
    with pytest.raises(CheckpointMismatch, match="aux_head"):
        convert(official(), SemanticTokenViT(**TINY, base_depth=1, tokens="all", class_token=True, stem="half_conv"))


@pytest.mark.parametrize("name", ["lvvit_small_patch16_224", "stvit_lvvit_small_patch16_224"])
def test_timm_loads_published_files(name: str, tmp_path) -> None:
    """With the file's classes, and with other classes and channels, where classifiers start anew."""
    torch.save({"state_dict": official()}, tmp_path / "lvvit.pth.tar")
    options = TINY | dict(base_depth=1, token_grid=2, pretrained=True)
    cfg = dict(file=str(tmp_path / "lvvit.pth.tar"), num_classes=5)
    model = timm.create_model(name, **options, pretrained_cfg_overlay=cfg)
    assert torch.equal(model.head.weight, official()["head.weight"])
    other = timm.create_model(name, **options | dict(num_classes=3, in_chans=1), pretrained_cfg_overlay=cfg)
    assert other.head.weight.shape == (3, 24) and other(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    assert torch.equal(other.base[0].mlp.fc1.weight, official()["blocks.0.mlp.fc1.weight"])


def test_resetting_replaces_both_classifiers() -> None:
    model = tiny()
    model.reset_classifier(7)
    assert model.head.weight.shape == model.aux_head.weight.shape == (7, 24)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 24)


def test_a_classifier_of_tokens_needs_tokens() -> None:
    for options in (dict(tokens="semantic"), dict(tokens="pooled"), dict(tokens="ats"), dict(class_token=False)):
        with pytest.raises(ValueError, match="token_head=True does not go with"):
            tiny(token_head=True, base_depth=1, token_grid=2, **options)
        assert tiny(base_depth=1, token_grid=2, **options).aux_head is None
    with pytest.raises(ValueError, match="must be even"):
        HalfConvStem(7, 3, 8)
    with pytest.raises(ValueError, match="one or the other"):
        Block(8, 2, layer_scale=0.1, residual_scale=0.5)


@pytest.mark.parametrize("tokens", ["all", "evit"])
def test_half_of_the_best_token_counts_beside_the_class_token(tokens: str) -> None:
    """Where EViT keeps only some tokens, too: two more for every token are one more for the image."""
    model, images = tiny(tokens=tokens), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        model.aux_head.bias += 2.0
        torch.testing.assert_close(model(images) - before, torch.ones(2, 5))


@pytest.mark.parametrize("mixed", [False, True])
def test_every_token_is_trained_with_its_images_label(mixed: bool) -> None:
    trainer = TokenLabelTrainer(tiny().train(), token_weight=0.25, smoothing=0.1).train()
    trainer.network.stem.eval()  # the same statistics in both passes
    batch = {"image": torch.randn(3, 3, 32, 32), "label": torch.tensor([0, 4, 2])}
    if mixed:
        batch["target"] = torch.rand(3, 5).softmax(dim=1)
    terms = trainer.losses(batch)
    logits, tokens = trainer.network(batch["image"])
    assert tokens.shape == (3, 16, 5)
    target = batch.get("target", F.one_hot(batch["label"], 5) * 0.9 + 0.1 / 5)
    torch.testing.assert_close(terms["loss_cls"], -(target * logits.log_softmax(-1)).sum(-1).mean())
    every = -(target[:, None] * tokens.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(terms["loss_tokens"], 0.25 * every)
    assert ("accuracy" in terms) != mixed
    sum(value for name, value in terms.items() if "loss" in name).backward()
    assert unreached(trainer.network) == []
    trainer.eval()
    assert trainer.predict(batch)["logits"].shape == (3, 5)


def test_semantic_tokens_are_trained_by_the_image_alone() -> None:
    trainer = TokenLabelTrainer(tiny(tokens="semantic", base_depth=1, token_grid=2)).train()
    terms = trainer.losses({"image": torch.randn(3, 3, 32, 32), "label": torch.tensor([0, 4, 2])})
    assert terms.keys() == {"loss_cls", "accuracy"} and trainer.table_figures({}) == {"tokens": 4}
