"""Token reducers on the plain ViT: what they have in common, and their cost."""

from __future__ import annotations

import pytest
import torch
from timm.models import group_parameters
from tiny_reducers import METHODS, TINY, build, each_method, lively, tiny, with_and_without_class_token

from stvit.models import SemanticTokenViT, stvit_deit_small
from stvit.models.reducers import ToMe, count_macs

# ------------------------------------------------------------------------------------ what all methods have in common


@each_method
@with_and_without_class_token
def test_methods_classify_any_size_in_either_mode(method: str, class_token: bool) -> None:
    model = build(method, class_token)
    for training in (False, True):
        model.train(training)
        for height, width in ((32, 32), (40, 28), (33, 47)):
            assert model(torch.randn(2, 3, height, width)).shape == (2, 5)


@each_method
@with_and_without_class_token
def test_logits_come_from_the_features(method: str, class_token: bool) -> None:
    """timm's contract: classifying what forward_features returns is the forward pass."""
    model = lively(build(method, class_token)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))


@each_method
def test_methods_have_the_weights_of_the_full_model(method: str) -> None:
    own = {n for n, _ in build(method, True).named_parameters()} - {n for n, _ in tiny("all", True).named_parameters()}
    fresh = {"dynamicvit": "reduction.predictors.", "pooled": "reducer.pool."}.get(method)
    assert all(name.startswith(fresh) for name in own) if fresh else not own
    assert bool(own) == bool(fresh)


@pytest.mark.parametrize("method", ["tome", "evit", "dynamicvit"])
def test_gradient_checkpointing_changes_nothing(method: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    model = lively(build(method, True)).train()
    gradients = []
    for enable in (False, True):
        torch.manual_seed(3)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        (model(images).square().sum() + sum(model.auxiliary_losses().values())).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("method", ["tome", "evit", "topk", "dynamicvit"])
def test_token_maps_show_where_every_image_token_went(method: str) -> None:
    model = lively(build(method, method != "topk")).eval()
    images = torch.randn(2, 3, 40, 28)
    maps = model.token_maps(images)
    assert maps.shape[0] == 2 and maps.shape[2:] == (10, 7)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(maps.shape[:2]))
    holders = (maps > 0).sum(dim=1)
    assert holders.max() == 1  # no image token is in two
    merged = method in ("tome", "evit")
    assert (holders.min() == 1) == merged  # merging and fusing lose nobody
    if not merged:
        assert (maps > 0).sum() == 2 * maps.shape[1]  # what is kept is one image token each


def test_layers_are_grouped_from_stem_to_head() -> None:
    model = build("dynamicvit", True)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["reduction.predictors.0.decide.0.weight"] == groups["norm.weight"] == groups["tail.0.norm1.weight"]
    assert set(groups) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        ("tomme", {}, "did you mean 'tome'"),
        ("tome", dict(token_options={"rate": 3}), "token_options={'rate': 3} do not fit tokens='tome'.*'rate'"),
        ("tome", dict(token_options={"r": -1}), "must not be negative"),
        ("tome", dict(token_options={"r": [1, 2]}), "one whole number from 0 on for each of 4 layers"),
        ("tome", dict(token_options={"r": 3, "inflect": 2}), "inflect=2"),
        ("evit", {}, "class_token=True, or choose score='attention'"),
        ("evit", dict(token_options={"keep_rate": 1.2, "score": "norm"}), "keep_rate=1.2"),
        ("topk", dict(token_options={"places": [1, 7]}), "ascending layer numbers from 0 to 3"),
        ("topk", dict(token_options={"score": "luck"}), "unknown score 'luck'"),
        ("dynamicvit", dict(token_options={"keep_ratio": 0.0}), "keep_ratio=0.0"),
        ("dynamicvit", dict(embed_dim=30), "a multiple of 4"),
        ("semantic", dict(class_token=True), "tokens='all'"),
        ("semantic", dict(macs=1e7), "choose token_grid"),
        ("all", dict(macs=1e7), "has no rate"),
        ("random", dict(macs=1e5), "this method reaches"),
    ],
)
def test_impossible_options_say_what_to_do(tokens: str, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemanticTokenViT(**(TINY | more), tokens=tokens)


# ------------------------------------------------------------------------------------ equal cost


@pytest.mark.parametrize(
    ("tokens", "options", "gmacs", "within"),
    [
        ("dynamicvit", dict(keep_ratio=0.7), 2.9, 0.03),  # 2.9 and 3.0 GFLOPs in the papers' tables
        ("evit", dict(keep_rate=0.7), 3.0, 0.02),
        ("tome", dict(r=0), 4.608, 0.01),
    ],
)
def test_published_operating_points_have_their_cost(tokens: str, options: dict, gmacs: float, within: float) -> None:
    with torch.device("meta"):
        model = stvit_deit_small(tokens=tokens, class_token=True, token_options=options)
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(gmacs, rel=within)


@pytest.mark.parametrize("method", ["tome", "evit", "topk", "dynamicvit", "random", "pooled"])
def test_costs_can_be_matched(method: str) -> None:
    tokens, options = METHODS[method]
    target = 0.75 * count_macs(tiny("all", True), (32, 32))
    if method == "pooled":  # grids are few on a small map
        target = count_macs(tiny("pooled", True, token_grid=(4, 7)), (32, 32))
    model = tiny(tokens, True, options, macs=target)
    assert count_macs(model, (32, 32)) == pytest.approx(target, rel=0.01)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_matching_leaves_weights_and_mode_alone() -> None:
    model = build("tome", True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.match_macs(0.7 * count_macs(model, (32, 32)))
    assert model.training
    assert all(value.device.type == "cpu" and torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert isinstance(model.reduction, ToMe) and model.reduction.merges != [6, 6, 6, 6]
