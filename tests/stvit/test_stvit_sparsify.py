"""timm's ViTs with fewer tokens: what is taken over, and what is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models import VisionTransformer
from timm.models.vision_transformer import ParallelScalingBlock
from tiny_reducers import build, lively, tiny
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from stvit.interop.token_reduction import sparsify
from stvit.models import SemanticTokenViT
from stvit.models.reducers import REDUCERS, DynamicViT, count_macs
from stvit.models.reducers.tome import bipartite_places


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


SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5)
# timm's own names, made small, and what else its constructor offers.
OTHERS = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", dict(global_pool="token")),
    "deit3": ("deit3_small_patch16_224", dict(reg_tokens=3)),
    "clip": ("vit_base_patch16_clip_224", {}),
    "quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip2": ("vit_so400m_patch14_siglip_224", dict(mlp_ratio=2.0)),
    "rectangular": ("vit_tiny_patch16_224", dict(img_size=(32, 24))),
    "mean": ("vit_tiny_patch16_224", dict(global_pool="avg")),
    "mean_beside_class": ("vit_tiny_patch16_224", dict(global_pool="avg", fc_norm=False)),
    "max_of_registers": ("vit_tiny_patch16_224", dict(global_pool="max", reg_tokens=2, class_token=False)),
    "no_norm": ("vit_tiny_patch16_224", dict(final_norm=False)),
    "tokens": ("vit_tiny_patch16_224", dict(global_pool="", num_classes=0)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_vits_of_timm_are_taken_over_as_they_are(case: str) -> None:
    name, options = OTHERS[case]
    vit = lively(timm.create_model(name, **(SMALL | options))).eval()
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    expected = vit(images)
    for method, own in (("all", {}), ("tome", dict(r=0))):
        torch.testing.assert_close(sparsify(vit, method, **own)(images), expected, rtol=1e-4, atol=1e-4)
    for method in REDUCERS:
        if method in ("dynamicvit", "ats") and vit.global_pool not in ("token", "avg", ""):
            with pytest.raises(ValueError, match="dropped tokens stay in place"):
                sparsify(vit, method)
            continue
        own = dict(score="norm") if method == "evit" and vit.cls_token is None else {}
        model = sparsify(vit, method, base_depth=1, stgm_depth=2, token_grid=2, **own)
        reduced = model(images)
        assert reduced.shape[-1] == expected.shape[-1] and reduced.ndim == expected.ndim
        if method in ("random", "pooled"):  # neither drops what stands in front
            assert model.forward_features(images).shape[1] == vit.num_prefix_tokens + 4
        if method == "semantic":
            base = vit.blocks[0](vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))
            got, _ = model.forward_base(images)
            if vit.cls_token is None or not hasattr(vit, "dist_token"):
                assert got.shape[1] == base.shape[1] - (vit.cls_token is not None)
            if vit.cls_token is None:  # registers are at work in the base layers
                torch.testing.assert_close(got, base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [2, 3, 5])
def test_tome_leaves_tokens_in_front_alone(prefix: int) -> None:
    """Against the form without them: with all else equal, the same image tokens merge, and the front stays in order."""
    metric = torch.randn(2, prefix + 12, 8)
    places = bipartite_places(metric, 4, prefix)
    assert places[:, :prefix].tolist() == [list(range(prefix))] * 2
    rest = places[:, prefix:]
    assert rest.min() == prefix and places.max() == prefix + 12 - 4 - 1
    assert all(len(set(row.tolist())) == 8 for row in rest)
    if prefix % 2 == 0:  # an even number changes no turns: the pairs are those without the front
        alone = bipartite_places(metric[:, prefix:], 4, 0)
        same, wanted = (one[:, :, None] == one[:, None] for one in (rest, alone))
        assert torch.equal(same, wanted)


def test_distilled_models_answer_with_both_tokens() -> None:
    vit = lively(timm.create_model("deit_tiny_distilled_patch16_224", **SMALL))
    model, images = sparsify(vit, "evit", keep_rate=0.5), torch.randn(2, 3, 32, 32)
    model.eval()
    tokens = model.forward_features(images)
    torch.testing.assert_close(model(images), (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, :2].mean(1))
    model.train().distilled_training = True
    assert isinstance(model(images), tuple)
    semantic = sparsify(vit, "semantic", stgm_depth=2, base_depth=1)
    torch.testing.assert_close(semantic.head.weight, (vit.head.weight + vit.head_dist.weight) / 2)
    assert semantic.reg_token is None and semantic.pos_embed.shape[1] == 64


@pytest.mark.compile
def test_wrapped_models_are_unwrapped() -> None:
    vit, images = timm_vit(), torch.randn(1, 3, 32, 32)
    for wrapped in (nn.DataParallel(vit), torch.compile(vit), AveragedModel(vit)):
        torch.testing.assert_close(sparsify(wrapped, "all")(images), vit(images), rtol=1e-4, atol=1e-4)


class OwnForward(VisionTransformer):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(qk_norm=True), "norms of queries"),
        (dict(proj_bias=False), "without a bias"),
        (dict(mlp_layer=SwiGLU), "two linear layers"),
        (dict(norm_layer="rmsnorm"), "LayerNorm"),
        (dict(pos_embed="none"), "position embedding"),
        (dict(patch_size=(4, 8)), "square patches"),
        (dict(patch_drop_rate=0.5), "patch dropout"),
        (dict(pool_include_prefix=True, global_pool="avg"), "pool_include_prefix"),
        (dict(global_pool="prr"), "'prr'"),
        (dict(block_fn=ParallelScalingBlock), "in turn"),
    ],
)
def test_vits_with_other_parts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(timm_vit(**options), "tome")


def test_vits_with_a_forward_pass_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="forward pass of its own"):
        sparsify(OwnForward(**SMALL), "tome")


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        sparsify(nn.Linear(2, 2), "tome")
    with pytest.raises(ValueError, match="do not fit into 4 layers"):
        sparsify(tiny("all"), "semantic", base_depth=4, stgm_depth=2)
