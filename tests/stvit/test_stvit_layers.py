"""Layers of plain ViTs: attention, blocks, pools of cells, global centres, merging."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from stvit.models import Attention, Block, PatchMerging, SemanticTokenGenerator, build_pool
from stvit.models.attention import relative_position_index
from stvit.models.clip_tokens import ClipTokenGenerator
from stvit.models.pooling import adaptive_cells
from stvit.models.window_tokens import WindowTokenGenerator


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


@pytest.mark.parametrize("kind", ["global", "window", "window_global", "clip", "between"])
def test_without_its_residual_the_attention_half_is_never_dropped(kind: str) -> None:
    """With stochastic depth of all but certainty, a half that may be dropped leaves zeros: the tokens would be lost."""
    options = dict(drop_path=1 - 1e-6, shortcut=False)
    if kind == "between":
        module = Block(8, 2, **options)
        calls = [lambda: module(x, between=lambda x, q, k: x)]
    else:
        module = {
            "global": lambda: SemanticTokenGenerator(8, 2, grid=2, depth=1, use_global=False, **options),
            "window": lambda: WindowTokenGenerator(8, 2, key_windows=(10,), **options),
            "window_global": lambda: WindowTokenGenerator(8, 2, key_windows=(None,), **options),
            "clip": lambda: ClipTokenGenerator(8, 2, key_windows=(10,), frames=2, **options),
        }[kind]()
        calls = [lambda: module(x) if kind == "clip" else module(x, (14, 14))]
    x = torch.randn(4, 2, 14, 14, 8) if kind == "clip" else torch.randn(4, 196, 8)
    layer = module if kind == "between" else module.layers[0]
    nn.init.zeros_(layer.mlp.fc2.weight), nn.init.zeros_(layer.mlp.fc2.bias)
    attended = module.eval() and calls[0]()
    assert attended.abs().flatten(1).amax(1).min() > 0
    module.train()
    torch.testing.assert_close(calls[0](), attended)


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


@pytest.mark.parametrize(("side", "cells", "before"), [(7, 2, 0), (12, 5, 1), (14, 4, 1)])
def test_an_odd_padding_has_its_larger_half_behind(side: int, cells: int, before: int) -> None:
    """Of `t` rows or columns in all, `t // 2` come first: 1 is none and one, 3 is one and two."""
    pool, window = build_pool("weighted", 4, (cells, cells)), -(-side // cells)
    x = torch.randn(1, side, side, 4)
    for axis in (1, 2):
        for place in range(side):
            changed = x.clone()
            changed.select(axis, place).add_(1)
            moved = (pool(changed) - pool(x)).abs().sum((0, 3)).amax(2 - axis) > 1e-6
            assert moved.nonzero().flatten().tolist() == [(place + before) // window]


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


def test_patch_merging_order_and_odd_sides() -> None:
    merge = PatchMerging(1)
    merge.norm = nn.Identity()
    merge.reduction = nn.Identity()
    assert merge(torch.arange(4.0).reshape(1, 4, 1), (2, 2)).flatten().tolist() == [0, 2, 1, 3]
    assert merge(torch.arange(1.0, 4).reshape(1, 3, 1), (1, 3)).flatten().tolist() == [1, 0, 2, 0, 3, 0, 0, 0]
