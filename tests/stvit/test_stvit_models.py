"""STViT for plain ViTs: size and cost of the published models, and how they behave."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.models import group_parameters
from tiny_vit import each_variant, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stvit.models import RandomTokens, SemanticTokenGenerator, stvit_deit_base, stvit_deit_small, stvit_deit_tiny


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def gmacs(model: nn.Module, size: int = 224) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


# ------------------------------------------------------------------------------------ published sizes


@pytest.mark.parametrize(
    ("build", "options", "millions", "macs"),
    [
        (stvit_deit_tiny, {}, 5.762, 0.527),
        (stvit_deit_small, {}, 22.213, 1.917),
        (stvit_deit_base, {}, 87.187, 7.288),
        (stvit_deit_small, dict(pool="max"), 22.056, 1.913),
        (stvit_deit_small, dict(pool="weighted"), 22.061, 1.915),
        # DeiT itself has a class token and its position: 2 * C parameters more than the full model without.
        (stvit_deit_tiny, dict(tokens="all", class_token=True), 5.717, 1.258),
        (stvit_deit_small, dict(tokens="all", class_token=True), 22.051, 4.608),
        (stvit_deit_base, dict(tokens="all", class_token=True), 86.568, 17.583),
    ],
)
def test_published_models_have_their_size_and_cost(
    build: object, options: dict[str, object], millions: float, macs: float
) -> None:
    with torch.device("meta"):
        model = build(**options)
    assert round(parameters(model) / 1e6, 3) == millions
    assert gmacs(model) == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize(
    ("options", "macs"),
    [
        (dict(stgm_depth=3), 1.978),
        (dict(stgm_depth=4), 2.038),
        (dict(base_depth=3), 1.568),
        (dict(base_depth=5), 2.266),
        (dict(base_depth=6), 2.615),
        (dict(base_depth=7), 2.964),
        (dict(base_depth=8), 3.312),
        (dict(base_depth=10), 4.010),
        (dict(token_grid=5), 2.048),
        (dict(token_grid=6), 2.210),
        (dict(token_grid=7), 2.402),
        (dict(token_grid=8), 2.627),
    ],
)
def test_depth_and_grid_ablations_have_their_cost(options: dict[str, object], macs: float) -> None:
    with torch.device("meta"):
        model = stvit_deit_small(**options)
    assert gmacs(model) == pytest.approx(macs, rel=0.01)


def test_global_centres_are_one_vector_per_token() -> None:
    with torch.device("meta"):
        assert parameters(stvit_deit_small()) - parameters(stvit_deit_small(use_global=False)) == 16 * 384


def test_the_controls_differ_in_the_reducer_only() -> None:
    names = {kind: {n for n, _ in tiny(tokens=kind).named_parameters()} for kind in ("all", "pooled", "random")}
    semantic = {name for name, _ in tiny().named_parameters()}
    assert names["all"] == names["random"]
    assert semantic - names["all"] == {n for n in semantic if n.startswith(("reducer.pool.", "reducer.global"))}
    assert names["pooled"] - names["all"] == {n for n in semantic if n.startswith("reducer.pool.")}


@pytest.mark.long
def test_cost_grows_with_the_token_grid() -> None:
    with torch.device("meta"):
        costs = [gmacs(stvit_deit_tiny(token_grid=grid)) for grid in ((1, 1), (1, 2), 2, 3, (3, 4), 4, 6, 9)]
        costs.append(gmacs(stvit_deit_tiny(tokens="all")))
    assert all(low < high for low, high in itertools.pairwise(costs))


# ------------------------------------------------------------------------------------ behaviour of the model


@each_variant
def test_variants_classify_any_size(options: dict[str, object]) -> None:
    model = tiny(**options).eval()
    for height, width in ((32, 32), (40, 24), (33, 47)):
        assert model(torch.randn(2, 3, height, width)).shape == (2, 5)


def test_token_maps_are_distributions_over_the_patch_grid() -> None:
    model = tiny(token_grid=(2, 3)).eval()
    maps = model.token_maps(torch.randn(2, 3, 40, 24))
    assert maps.shape == (2, 6, 10, 6)
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(2, 6))


def test_token_maps_show_the_attention_that_makes_the_tokens() -> None:
    generator = SemanticTokenGenerator(8, 2, grid=2, depth=1, pool="max", use_global=False)
    x = torch.randn(1, 16, 8)
    # With W_v = identity and the rest of the layer switched off, the update is the attention-weighted mean of LN1(X).
    layer = generator.layers[0]
    nn.init.eye_(layer.attn.kv.weight[8:].data)
    nn.init.zeros_(layer.attn.kv.bias)
    nn.init.eye_(layer.attn.proj.weight)
    nn.init.zeros_(layer.attn.proj.bias)
    nn.init.zeros_(layer.mlp.fc2.weight)
    nn.init.zeros_(layer.mlp.fc2.bias)
    layer.attn.num_heads = 1
    maps = generator.token_maps(x, (4, 4)).flatten(2)
    torch.testing.assert_close(generator(x, (4, 4)) - generator.centres(x, (4, 4)), maps @ layer.norm1(x))


def test_token_maps_need_semantic_tokens() -> None:
    with pytest.raises(ValueError, match="semantic"):
        tiny(tokens="pooled").token_maps(torch.randn(1, 3, 32, 32))


def test_random_tokens_repeat_in_evaluation_and_vary_in_training() -> None:
    torch.manual_seed(1)
    keep = RandomTokens(8, 2, num_tokens=16)
    device = torch.device("cpu")
    keep.eval()
    kept = keep.kept(2, 196, device)
    assert torch.equal(kept, keep.kept(2, 196, device))
    assert torch.equal(kept[0], kept[1])
    assert kept.shape == (2, 16) and kept[0].unique().numel() == 16 and kept.max() < 196
    assert not torch.equal(kept[0], RandomTokens(8, 2, num_tokens=16, seed=1).eval().kept(1, 196, device)[0])
    keep.train()
    drawn = keep.kept(64, 196, device)
    assert (drawn.diff(dim=1) > 0).all()
    assert not torch.equal(drawn[0], drawn[1])
    # 64 * 16 draws of 196 positions: all parts of the image are met.
    assert drawn.flatten().unique().numel() > 180

    def draw(seed: int) -> Tensor:
        return keep.kept(2, 196, device, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_random_choice_of_evaluation_is_spread_over_the_image() -> None:
    counts = torch.zeros(196)
    for seed in range(400):
        counts[RandomTokens(8, 2, num_tokens=16, seed=seed).eval().kept(1, 196, torch.device("cpu"))[0]] += 1
    # 400 * 16 / 196 = 33 expected per position, deviation 5.5.
    assert counts.min() > 33 - 5 * 5.5
    assert counts.max() < 33 + 5 * 5.5


def test_model_takes_a_generator_for_random_tokens_only() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = tiny(tokens="random").train()
    first = model(images, torch.Generator().manual_seed(0))
    assert torch.equal(first, model(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, model(images, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="random"):
        tiny()(images, torch.Generator())


def test_gradient_checkpointing_changes_nothing() -> None:
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    model = tiny().train()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@each_variant
def test_stochastic_depth_rises_linearly_through_all_layers(options: dict[str, object]) -> None:
    model = tiny(drop_path_rate=0.4, **options)
    layers = [*model.base, *model.reducer.layers, *model.tail]
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_position_embedding_of_the_own_size_is_used_as_it_is() -> None:
    model = tiny()
    assert model._position((8, 8)) is model.pos_embed
    assert model._position((10, 6)).shape == (1, 60, 32)


def test_classifier_contract() -> None:
    model = tiny()
    assert model.num_features == model.head_hidden_size == 32
    assert model.get_classifier().out_features == 5
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 4, 32)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1))
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 32)


@pytest.mark.parametrize("kind", ["semantic", "all", "pooled"])
def test_layer_groups_run_from_stem_to_head(kind: str) -> None:
    model = tiny(tokens=kind)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["stem.proj.weight"] == groups["pos_embed"] == 0
    assert [groups[f"base.{i}.norm1.weight"] for i in range(2)] == [1, 2]
    assert [groups[f"reducer.layers.{i}.norm1.weight"] for i in range(2)] == [3, 4]
    assert groups["tail.0.norm1.weight"] == groups["norm.weight"] == 5
    assert groups["head.weight"] == 6
    assert {groups[name] for name in groups if name.startswith(("reducer.pool", "reducer.global"))} <= {3}
    assert set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens="none"), "use one of semantic"),
        (dict(pool="median"), "weighted_offset"),
        (dict(global_in="value"), "'query' or 'key'"),
        (dict(pool="none", use_global=False), "use_global=True"),
        (dict(stgm_depth=1), "depth >= 2"),
        (dict(base_depth=4, stgm_depth=2), "at most depth"),
        (dict(num_heads=5), "heads of equal size"),
        (dict(stem="conv", patch_size=6), "patch_size=6"),
        (dict(stem="linear"), "'patch', 'conv' or 'half_conv'"),
        (dict(class_token=True), "tokens='all'"),
        (dict(token_position="absolute"), "none, learned, conv, relative"),
        (dict(token_position="learned", tokens="pooled"), "token_position='none' with tokens='pooled'"),
        (dict(token_position="relative", stgm_depth=3), "layers behind generation"),
    ],
)
def test_impossible_options_say_what_to_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_random_tokens_cannot_outnumber_the_image() -> None:
    with pytest.raises(ValueError, match="reduce token_grid"):
        tiny(tokens="random", token_grid=9).eval()(torch.randn(1, 3, 32, 32))
