"""Controls of semantic tokens on the plain ViT, and weights and costs of the reducers, piece by piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stvit.models import SemanticTokenViT
from stvit.models.controls import PooledTokens, RandomTokens, near_squares
from stvit.models.reducers import count_macs, match_macs

TINY = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=32, depth=4, num_heads=2, base_depth=1, token_grid=3)


def test_pooled_centres_attend_each_other_and_the_tokens_before_them() -> None:
    control = PooledTokens(8, 2, grid=(2, 3), pool="avg").eval()
    x = torch.randn(2, 1 + 4 * 6, 8)
    maps = x[:, 1:].transpose(1, 2).reshape(2, 8, 4, 6)
    expected = torch.cat([x[:, :1], F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)], dim=1)
    for layer in control.layers:
        expected = layer(expected)
    torch.testing.assert_close(control(x, (4, 6)), expected)
    assert control.num_tokens == 6


def test_random_tokens_are_some_of_those_that_came_in() -> None:
    control = RandomTokens(8, 2, num_tokens=5, depth=1)
    x = torch.randn(2, 1 + 12, 8)
    for training in (True, False):
        control.train(training)
        torch.manual_seed(1)
        kept = control.kept(2, 12, x.device)
        torch.manual_seed(1)
        chosen = torch.cat([x[:, :1], torch.stack([x[b, 1 + kept[b]] for b in range(2)])], dim=1)
        torch.testing.assert_close(control(x, (3, 4)), control.layers[0](chosen))


def test_a_number_of_random_tokens_wins_over_the_grid() -> None:
    assert SemanticTokenViT(**TINY, tokens="random").remaining_tokens() == 9
    assert SemanticTokenViT(**TINY, tokens="random", token_options={"num_tokens": 20}).remaining_tokens() == 20
    rectangle = TINY | dict(token_grid=(2, 4))
    assert {SemanticTokenViT(**rectangle, tokens=t).remaining_tokens() for t in ("semantic", "pooled", "random")} == {8}


def test_grids_for_a_cost_are_nearly_square() -> None:
    assert near_squares(12) == [(1, 1), (1, 2), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4)]
    assert near_squares(12, aspect=1.0) == [(1, 1), (2, 2), (3, 3)]
    areas = [height * width for height, width in near_squares(196)]
    assert areas == sorted(set(areas)) and areas[-1] == 196


def test_loss_terms_are_weighted() -> None:
    terms = []
    for ratio_weight, token_weight in ((2.0, 0.5), (6.0, 0.25)):
        torch.manual_seed(0)
        model = SemanticTokenViT(**TINY, tokens="dynamicvit", token_options={"ratio_weight": ratio_weight}).train()
        teacher = model.forward_features(torch.randn(3, 3, 32, 32)).detach() + 1
        terms.append(model.auxiliary_losses(teacher, token_weight))
    assert terms[0]["loss_keep_ratio"] > 0 < terms[0]["loss_tokens"]
    torch.testing.assert_close(terms[1]["loss_keep_ratio"], 3 * terms[0]["loss_keep_ratio"])
    torch.testing.assert_close(terms[1]["loss_tokens"], terms[0]["loss_tokens"] / 2)


@pytest.mark.long
def test_the_nearest_cost_is_chosen() -> None:
    model = SemanticTokenViT(**TINY, tokens="random")

    def keep(model: SemanticTokenViT, tokens: int) -> None:
        model.reducer.set_rate(tokens)

    costs = {}
    for tokens in (10, 30, 40, 50, 64):
        keep(model, tokens)
        costs[tokens] = count_macs(model, (32, 32))
    for tokens, cost in costs.items():
        for share in (0.993, 1.007):  # too far to stop early, on either side
            found = match_macs(model, share * cost, (32, 32), rates=list(costs), set_rate=keep)
            assert found == tokens == model.reducer.num_tokens
    with pytest.raises(ValueError, match="nearest is"):
        match_macs(model, (costs[30] + costs[40]) / 2, (32, 32), rates=list(costs), set_rate=keep)


def test_a_share_of_one_keeps_every_token() -> None:
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    full = SemanticTokenViT(**TINY, tokens="all").eval()
    for tokens, options in (("topk", {"keep_rate": 1.0}), ("dynamicvit", {"keep_ratio": 1.0}), ("tome", {"r": 0})):
        model = SemanticTokenViT(**TINY, tokens=tokens, token_options=options).eval()
        model.load_state_dict(full.state_dict(), strict=False)
        torch.testing.assert_close(model(images), full(images), rtol=1e-4, atol=1e-5)
