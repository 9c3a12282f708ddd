"""timm's ViTs with fewer tokens: what is taken over, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import VisionTransformer
from tiny_reducers import build, lively, tiny
from torch import Tensor, nn

from stvit.models import SemanticTokenViT
from stvit.models.reducers import REDUCERS, DynamicViT, count_macs
from stvit.token_reduction import sparsify


def timm_vit(**options: object) -> VisionTransformer:
    return lively(
        VisionTransformer(
            **(dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5) | options)
        )
    ).eval()


@pytest.mark.parametrize(
    "options", [{}, dict(init_values=0.1), dict(qkv_bias=False)], ids=["deit", "scales", "no_bias"]
)
def test_a_timm_model_is_taken_over_as_it_is(options: dict) -> None:
    vit = timm_vit(**options)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(sparsify(vit, "all")(images), vit(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparsify(vit, "tome", r=0)(images), vit(images), rtol=1e-4, atol=1e-4)
    assert not sparsify(vit, "evit").training


def test_every_method_starts_from_a_timm_model() -> None:
    vit = timm_vit()
    images = torch.randn(2, 3, 32, 32)
    full = sparsify(vit, "all")
    for method in REDUCERS:
        model = sparsify(vit, method, base_depth=1, stgm_depth=2, token_grid=2)
        assert (model.cls_token is None) == (method == "semantic")
        assert model(images).shape == (2, 5)
        for name in ("base.0.attn.q.weight", "reducer.layers.1.mlp.fc1.weight", "tail.0.norm1.bias", "head.weight"):
            assert torch.equal(model.state_dict()[name], vit_weight(full, name))


def vit_weight(full: SemanticTokenViT, name: str) -> Tensor:
    """The weight of the full model that belongs to `name` of a model with one base layer and two after it."""
    layers = nn.ModuleDict({"head": full.head})
    layers["base"] = nn.ModuleList([*full.base, *full.reducer.layers, *full.tail])
    place = name.replace("reducer.layers.1", "base.2").replace("tail.0", "base.3")
    return layers.state_dict()[place]


def test_sparsify_copies() -> None:
    model = lively(build("dynamicvit", True))
    before = copy.deepcopy(model.state_dict())
    merged = sparsify(model, "tome", r=4, macs=None)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert merged.training and isinstance(model.reduction, DynamicViT)
    semantic = sparsify(model, "semantic", token_grid=(2, 3), shortcut=False)
    assert semantic(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert semantic.pos_embed.shape == (1, 64, 32) and not semantic.reducer.layers[0].shortcut
    assert sparsify(semantic, "all").reducer.layers[0].shortcut


def test_sparsify_matches_a_cost() -> None:
    full = tiny("all", True)
    target = 0.6 * count_macs(full, (32, 32))
    for method in ("tome", "evit", "dynamicvit"):
        assert count_macs(sparsify(full, method, macs=target), (32, 32)) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reg_tokens=2), "register or distillation tokens"),
        (dict(global_pool="avg"), "fc_norm"),
        (dict(no_embed_class=True), "leaves out the class token"),
        (dict(pre_norm=True), "norm_pre"),
        (dict(act_layer="gelu_tanh"), "exact GELU"),
    ],
)
def test_vits_with_other_parts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(timm_vit(**options), "tome")


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        sparsify(nn.Linear(2, 2), "tome")
    with pytest.raises(ValueError, match="do not fit into 4 layers"):
        sparsify(tiny("all"), "semantic", base_depth=4, stgm_depth=2)
