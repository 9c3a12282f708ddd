"""STViT for plain ViTs: size and cost of the published models, and how modules behave."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stvit.models import (
    Attention,
    Block,
    PatchMerging,
    RandomTokens,
    SemanticTokenGenerator,
    SemanticTokenViT,
    TokenRecovery,
    WindowTokenGenerator,
    WindowTokenRecovery,
    build_pool,
    stvit_deit_base,
    stvit_deit_small,
    stvit_deit_tiny,
)
from stvit.models.attention import relative_position_index
from stvit.models.key_windows import KeyWindows, WindowKeys
from stvit.models.pooling import adaptive_cells
from stvit.models.window_attention import METHODS, window_attention
from stvit.models.windows import merge_windows, split_windows, valid_cells

TINY = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=32, depth=5, num_heads=2, base_depth=2, token_grid=2)
# Every way to build the model that changes what is computed.
VARIANTS = {
    "default": {},
    "max": dict(pool="max"),
    "avg": dict(pool="avg"),
    "weighted": dict(pool="weighted"),
    "no_global": dict(use_global=False),
    "global_only": dict(pool="none"),
    "global_in_key": dict(global_in="key"),
    "no_shortcut": dict(shortcut=False, layer_scale=0.1),
    "stgm3": dict(stgm_depth=3),
    "rectangular_grid": dict(token_grid=(2, 3)),
    "learned": dict(token_position="learned"),
    "conv": dict(token_position="conv"),
    "relative": dict(token_position="relative"),
    "conv_stem": dict(stem="conv"),
    "all": dict(tokens="all"),
    "class_token": dict(tokens="all", class_token=True),
    "pooled": dict(tokens="pooled"),
    "random": dict(tokens="random"),
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**options: object) -> SemanticTokenViT:
    return SemanticTokenViT(**(TINY | options))


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


@each_variant
def test_samples_of_a_batch_do_not_see_each_other(options: dict[str, object]) -> None:
    model = tiny(**options).eval()
    images = torch.randn(3, 3, 32, 32)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)


@each_variant
def test_gradients_reach_every_parameter(options: dict[str, object]) -> None:
    model = tiny(**options).train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize(
    "variant",
    [
        "default",
        "max",
        "avg",
        "global_only",
        "global_in_key",
        "learned",
        "conv",
        "relative",
        "conv_stem",
        "class_token",
        "pooled",
        "random",
    ],
)
def test_compiled_and_exported_models_give_the_same(variant: str) -> None:
    model = tiny(depth=4, base_depth=1, **VARIANTS[variant]).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), logits)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), logits)


@pytest.mark.parametrize("kind", ["semantic", "random"])
def test_training_step_compiles_without_graph_breaks(kind: str) -> None:
    model = tiny(tokens=kind, drop_path_rate=0.1).train()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="eager")(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.pos_embed.grad is not None


@each_variant
def test_half_precision_is_finite(options: dict[str, object]) -> None:
    model = tiny(**options).train()
    images = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.to(torch.bfloat16).eval()(images.bfloat16()).isfinite().all()


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
    with pytest.raises(ValueError, match="class_token"):
        model.reset_classifier(3, global_pool="token")


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
        (dict(stem="linear"), "'patch' or 'conv'"),
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


# ------------------------------------------------------------------------------------ layers


def test_keys_of_several_sources_equal_their_concatenation() -> None:
    block = Block(16, 2, layer_scale=0.1)
    x, s, y = torch.randn(2, 4, 16), torch.randn(2, 4, 16), torch.randn(2, 9, 16)
    torch.testing.assert_close(block(x, [s, y]), block(x, torch.cat([s, y], dim=1)))


def test_attention_weights_and_masks_agree_with_the_fused_kernel() -> None:
    attention = Attention(16, 2, relative_window=3)
    x = torch.randn(2, 9, 16)
    mask = torch.rand(9, 9) > 0.3
    mask |= torch.eye(9, dtype=torch.bool)
    q, k, v = attention.queries(x), *attention.keys_values(x)
    for allowed in (None, mask, torch.zeros(9, 9).masked_fill(~mask, float("-inf"))):
        weights = attention.weights(q, k, allowed)
        expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, mask=allowed), expected)


def test_relative_bias_depends_on_the_offset_alone() -> None:
    index = relative_position_index(2, 3)
    assert index.shape == (6, 6) and index.unique().numel() == 3 * 5
    # Tokens 0 -> 1 and 4 -> 5 are the same step to the right; 0 -> 3 is a step down.
    assert index[0, 1] == index[4, 5] != index[0, 3]


def test_local_block_mixes_inside_windows_only() -> None:
    block = Block(8, 2, window=2).eval()
    x = torch.randn(1, 24, 8)
    changed = x.clone()
    changed[:, 0] = torch.randn(8)  # first row, first column of a 4 x 6 grid
    moved = (block(changed, grid=(4, 6)) - block(x, grid=(4, 6))).abs().sum(-1)[0] > 1e-7
    assert moved.nonzero().flatten().tolist() == [0, 1, 6, 7]
    with pytest.raises(ValueError, match="multiple"):
        block(torch.randn(1, 15, 8), grid=(3, 5))
    with pytest.raises(ValueError, match="grid="):
        block(x)


def test_stochastic_depth_spares_evaluation_and_drops_whole_samples() -> None:
    block = Block(8, 2, drop_path=0.5)
    x = torch.randn(64, 3, 8)
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train()
    untouched = (block(x) == x).flatten(1).all(1)
    assert 0 < untouched.sum() < 64


def test_no_shortcut_starts_from_the_attention_alone() -> None:
    block = Block(8, 2, shortcut=False, layer_scale=0.0)
    assert not block(torch.randn(1, 4, 8), torch.randn(1, 9, 8)).any()


def test_adaptive_cells_overlap_as_documented() -> None:
    assert adaptive_cells(7, 3) == [(0, 3), (2, 5), (4, 7)]
    assert adaptive_cells(14, 4) == [(0, 4), (3, 7), (7, 11), (10, 14)]


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_adaptive_pools_reduce_their_cells(kind: str) -> None:
    x = torch.randn(2, 7, 9, 4)
    pooled = build_pool(kind, 4, (3, 2))(x)
    reduce = torch.amax if kind == "max" else torch.mean
    for (i, (top, bottom)), (j, (left, right)) in itertools.product(
        enumerate(adaptive_cells(7, 3)), enumerate(adaptive_cells(9, 2))
    ):
        torch.testing.assert_close(pooled[:, i, j], reduce(x[:, top:bottom, left:right], dim=(1, 2)))


@pytest.mark.parametrize("kind", ["max", "avg", "weighted", "weighted_offset"])
def test_pools_ignore_invalid_positions(kind: str) -> None:
    pool = build_pool(kind, 4, (2, 2))
    x = torch.randn(2, 6, 6, 4)
    valid = torch.zeros(2, 6, 6, dtype=torch.bool)
    valid[0, :5, :4] = True
    valid[1, :3] = True
    junk = torch.where(valid[..., None], x, torch.full_like(x, 1e3))
    torch.testing.assert_close(pool(x, valid), pool(junk, valid))
    if kind in ("max", "avg", "weighted"):
        assert not pool(x, valid)[1, 1].any()  # a cell without valid positions


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pools_commute_with_a_horizontal_flip(kind: str) -> None:
    pool = build_pool(kind, 4, (3, 3))
    x = torch.randn(1, 7, 7, 4)
    torch.testing.assert_close(pool(x.flip(2)), pool(x).flip(2))


def test_weighted_centres_are_means_of_their_own_window() -> None:
    pool = build_pool("weighted", 4, (2, 2))
    x = torch.randn(1, 6, 6, 4)
    changed = x.clone()
    changed[:, 3:, 3:] += 1
    moved = (pool(changed) - pool(x)).abs().sum(-1)[0] > 1e-7
    assert moved.tolist() == [[False, False], [False, True]]
    torch.testing.assert_close(pool(torch.ones(1, 6, 6, 4)), torch.ones(1, 2, 2, 4))
    # 7 rows on a grid of 2: one row of padding behind, which weighs nothing.
    torch.testing.assert_close(pool(torch.ones(1, 7, 7, 4)), torch.ones(1, 2, 2, 4))


def test_global_centres_enter_where_they_are_told() -> None:
    x = torch.randn(1, 16, 8)

    plain = SemanticTokenGenerator(8, 2, grid=2, use_global=False).eval()
    s1 = plain.layers[0](plain.centres(x, (4, 4)), x)
    centres = torch.randn(1, 4, 8)

    def with_global(where: str) -> Tensor:
        generator = SemanticTokenGenerator(8, 2, grid=2, global_in=where).eval()
        generator.load_state_dict(plain.state_dict() | {"global_centres": centres})
        return generator(x, (4, 4))

    # The query and its residual are S1 + G, the keys S1 without G; or the other way round.
    second = plain.layers[1]
    torch.testing.assert_close(with_global("query"), second(s1 + centres, torch.cat([s1, x], dim=1)))
    torch.testing.assert_close(with_global("key"), second(s1, torch.cat([s1 + centres, x], dim=1)))
    only = SemanticTokenGenerator(8, 2, grid=2, pool="none")
    assert torch.equal(only.centres(x, (4, 4)), only.global_centres)


# ------------------------------------------------------------------------------------ position of semantic tokens

POSITIONS = {
    "learned": {"reducer.position"},
    "conv": {"reducer.conv_pos.weight", "reducer.conv_pos.bias"},
    "relative": {"tail.0.attn.relative_position_bias_table"},
}


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_are_added_to_the_model_without(position: str) -> None:
    plain, model = tiny(token_grid=(2, 3)).eval(), tiny(token_grid=(2, 3), token_position=position).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == POSITIONS[position] and not unexpected
    images = torch.randn(2, 3, 32, 32)
    expected = plain(images)
    assert (model(images) - expected).abs().max() > 1e-5
    for name in POSITIONS[position]:
        nn.init.zeros_(model.get_parameter(name))
    torch.testing.assert_close(model(images), expected)


def test_learned_positions_are_one_vector_per_centre() -> None:
    generator = SemanticTokenGenerator(4, 2, grid=(2, 3), pool="avg", position="learned")
    flat = torch.ones(1, 24, 4)  # all centres are alike but for their position
    torch.testing.assert_close(generator.centres(flat, (4, 6)), 1 + generator.position)
    assert generator.position.shape == (1, 6, 4) and generator.position.unique(dim=1).shape[1] == 6


def test_convolutional_positions_look_around_on_the_grid_of_centres() -> None:
    generator = SemanticTokenGenerator(1, 1, grid=(2, 3), pool="avg", position="conv")
    nn.init.zeros_(generator.conv_pos.weight)
    nn.init.zeros_(generator.conv_pos.bias)
    generator.conv_pos.weight.data[0, 0, 1, 0] = 1  # the left neighbour, nothing beyond the edge
    x = torch.tensor([1.0, 2, 3, 10, 20, 30]).reshape(1, 6, 1)
    assert generator.centres(x, (2, 3)).flatten().tolist() == [1, 3, 5, 10, 30, 50]


def test_relative_positions_make_the_order_of_tokens_matter() -> None:
    tokens, order = torch.randn(1, 4, 32), torch.tensor([1, 0, 2, 3])
    for position, alike in (("learned", True), ("relative", False)):
        layer = tiny(token_position=position).eval().tail[0]
        if position == "relative":
            nn.init.normal_(layer.attn.relative_position_bias_table)
        assert torch.allclose(layer(tokens[:, order]), layer(tokens)[:, order], atol=1e-6) is alike


def test_positions_are_not_decayed_and_learn_with_the_first_generation_layer() -> None:
    for position, kept in (("none", set()), ("learned", {"reducer.position"}), ("relative", POSITIONS["relative"])):
        model = tiny(token_position=position)
        matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
        assert matrices & model.no_weight_decay() == {"pos_embed"} | kept
    for position in ("learned", "conv"):
        model = tiny(token_position=position)
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert {groups[name] for name in POSITIONS[position]} == {groups["reducer.layers.0.norm1.weight"]}


def test_the_generator_knows_positions_of_centres_only() -> None:
    with pytest.raises(ValueError, match="'none', 'learned' or 'conv'"):
        SemanticTokenGenerator(8, 2, position="relative")


def test_patch_merging_order_and_odd_sides() -> None:
    merge = PatchMerging(1)
    merge.norm = nn.Identity()
    merge.reduction = nn.Identity()
    assert merge(torch.arange(4.0).reshape(1, 4, 1), (2, 2)).flatten().tolist() == [0, 2, 1, 3]
    assert merge(torch.arange(1.0, 4).reshape(1, 3, 1), (1, 3)).flatten().tolist() == [1, 0, 2, 0, 3, 0, 0, 0]


# ------------------------------------------------------------------------------------ windows of any map


def test_windows_split_and_merge_back() -> None:
    x = torch.randn(2, 24, 3)
    windows = split_windows(x, (4, 6), 2)
    assert windows.shape == (12, 4, 3)
    assert torch.equal(windows[1, 0], x[0, 2])
    assert torch.equal(merge_windows(windows, (4, 6), 2), x)


def test_valid_cells_count_cells_with_real_positions() -> None:
    for size, window, cells in itertools.product(range(1, 22), (5, 7), (2, 3, 4)):
        count = -(-size // window)
        real = sum(
            w * window + start < size for w in range(count) for start, _ in adaptive_cells(window, cells)
        )  # fmt: skip
        assert valid_cells(size, window, cells) == real


@pytest.mark.parametrize(
    ("grid", "key_grid", "windows"),
    [
        ((6, 6), (10, 12), KeyWindows(queries=3, size=14, stride=7)),
        ((6, 9), (14, 17), KeyWindows(queries=3, size=10, stride=7)),
        ((10, 17), (6, 9), KeyWindows(queries=7, size=5, stride=3)),
        ((3, 3), (4, 5), KeyWindows(queries=3, size=21, stride=7)),
        ((24, 17), (12, 9), KeyWindows(queries=7, size=6, stride=3)),
    ],
)
def test_window_attention_equals_one_query_at_a_time(
    grid: tuple[int, int], key_grid: tuple[int, int], windows: KeyWindows
) -> None:
    attention = Attention(8, 2)
    valid = (key_grid[0] - 1, key_grid[1] - 1)
    x, y = torch.randn(2, grid[0] * grid[1], 8), torch.randn(2, key_grid[0] * key_grid[1], 8)
    expected = torch.empty_like(x)
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        top, left = (place // windows.queries * windows.stride - windows.before for place in (row, column))
        seen = [
            r * key_grid[1] + c
            for r in range(max(top, 0), min(top + windows.size, valid[0]))
            for c in range(max(left, 0), min(left + windows.size, valid[1]))
        ]
        here = row * grid[1] + column
        expected[:, here : here + 1] = attention(x[:, here : here + 1], y[:, seen])
    keys = WindowKeys(windows, grid, key_grid, valid)
    for method in METHODS:
        got = window_attention(attention, x, y, keys, method=method)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gather, masked"):
        window_attention(attention, x, y, keys, method="dense")


@pytest.mark.parametrize("pool", ["max", "avg", "weighted_offset"])
@pytest.mark.parametrize("hw", [(14, 14), (10, 12), (5, 23)])
def test_window_tokens_of_any_map(hw: tuple[int, int], pool: str) -> None:
    generator = WindowTokenGenerator(8, 2, pool=pool, norm_eps=1e-5).eval()
    recovery = WindowTokenRecovery(8, 2, norm_eps=1e-5).eval()
    x = torch.randn(2, hw[0] * hw[1], 8)
    tokens = generator(x, hw)
    grid = generator.token_grid(hw)
    assert grid == (-(-hw[0] // 7) * 3, -(-hw[1] // 7) * 3)
    assert tokens.shape == (2, grid[0] * grid[1], 8)
    assert torch.allclose(generator(x[:1], hw), tokens[:1], atol=1e-5)
    back = recovery(x, hw, tokens)
    assert back.shape == x.shape and back.isfinite().all()


def test_window_tokens_read_their_key_window_only() -> None:
    generator = WindowTokenGenerator(8, 2, key_windows=(9,)).eval()
    x = torch.randn(1, 21 * 21, 8)
    changed = x.clone()
    changed[:, 0] = torch.randn(8)  # image token (0, 0)
    moved = (generator(changed, (21, 21)) - generator(x, (21, 21))).abs().sum(-1).reshape(9, 9) > 1e-6
    assert moved[:3, :3].all() and moved.sum() == 9


def test_tokens_of_padding_are_never_recovered_from() -> None:
    recovery = WindowTokenRecovery(8, 2).eval()
    x, tokens = torch.randn(1, 8 * 7, 8), torch.randn(1, 6 * 3, 8)
    junk = tokens.clone().reshape(6, 3, 8)
    junk[4:] = 1e3  # 8 rows: of the second window only the first cell holds a real position
    assert torch.equal(recovery(x, (8, 7), junk.reshape(1, 18, 8)), recovery(x, (8, 7), tokens))


def test_global_recovery_reads_all_tokens() -> None:
    recovery = TokenRecovery(8, 2).eval()
    x, tokens = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    changed = tokens.clone()
    changed[:, 2] = torch.randn(8)
    assert ((recovery(x, changed) - recovery(x, tokens)).abs().sum(-1) > 1e-5).all()
