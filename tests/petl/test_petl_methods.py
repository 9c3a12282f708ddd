"""Every method in every family of backbones: where it goes, what it trains, and how it begins."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import petl
from petl.models.inject import percentage
from petl.models.methods.base import starts_as_backbone
from tests.petl.backbones import BACKBONES, METHODS, NO_PLACE, PAIRS, disturbed, tiny_convnext, tiny_vit, tuned

REFUSED = [(family, name) for family in BACKBONES for name in sorted(NO_PLACE[family])]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_only_what_the_method_says_is_trained(family: str, name: str, images: torch.Tensor) -> None:
    """Three steps: whatever is trained gets gradients that are not zero, and all else stays bit for bit."""
    model = tuned(family, name).train()
    before = copy.deepcopy(model.state_dict())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    reached: set[str] = set()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        reached |= {
            n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        }
        optimizer.step()
    assert trained == reached
    after = model.state_dict()
    assert {n for n in after if not torch.equal(before[n], after[n])} == trained
    assert sum(row["parameters"] for row in petl.parameter_table(model)) == petl.delta_parameters(model, head=True)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_begins_as_the_frozen_network(family: str, name: str, images: torch.Tensor) -> None:
    model = tuned(family, name).eval()
    torch.manual_seed(0)
    plain = BACKBONES[family]()
    plain.load_state_dict({n.removeprefix("backbone."): v for n, v in model.state_dict().items() if "backbone" in n})
    difference = float((model(images) - plain.eval()(images)).abs().max())
    if starts_as_backbone(model.method):
        assert difference < 1e-6
    else:
        assert difference > 0
    assert float((disturbed(model)(images) - plain(images)).abs().max()) > 1e-4


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_no_place_is_an_error_that_lists_what_there_is(family: str, name: str) -> None:
    with pytest.raises(petl.NoSite) as told:
        petl.inject(BACKBONES[family](), METHODS[name]())
    kinds = {"vit": "Block", "swin": "SwinTransformerBlock", "convnext": "ConvNeXtBlock"}[family]
    message = str(told.value)
    assert kinds in message or "blocks of one width" in message


def test_a_network_without_known_blocks() -> None:
    with pytest.raises(petl.NoSite, match="Sequential has none of the blocks"):
        petl.inject(nn.Sequential(nn.Linear(4, 4)), petl.Full())


def test_norms_are_found_by_type() -> None:
    """Names say nothing: a linear layer called norm is left alone, a LayerNorm called otherwise is found."""

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = tiny_vit()
            self.block.blocks[0].norm1 = nn.Sequential(nn.LayerNorm(24))
            self.layer_norm_like = nn.Linear(3, 3)
            self.plain_norm = nn.Identity()
            self.without = nn.LayerNorm(5, elementwise_affine=False)

        def get_classifier(self) -> nn.Module:
            return self.block.head

    model = petl.inject(Renamed(), petl.LNTune())
    trained = {n for n, p in model.named_parameters() if p.requires_grad and not model.in_head(n)}
    assert "backbone.block.blocks.0.norm1.0.weight" in trained
    assert not any("layer_norm_like" in n or "without" in n for n in trained)
    assert petl.trainable_parameters(model) == 5 * 2 * 24


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vit_base_patch16_224", (85_798_656, 38_400, 102_912)),
        ("vit_large_patch16_224", (303_301_632, 100_352, 272_384)),
        ("swin_base_patch4_window7_224", (86_743_224, 57_600, 137_216)),
        ("convnext_base", (87_566_464, 40_192, 130_304)),
    ],
)
def test_published_sizes(name: str, counts: tuple[int, int, int]) -> None:
    """Total, LayerNorms and biases of the backbones of the tables, without their heads (section 2.1)."""
    found = []
    for method in (petl.Full(), petl.LNTune(), petl.BitFit()):
        with torch.device("meta"):
            found.append(petl.delta_parameters(petl.inject(timm.create_model(name), method, num_classes=3)))
    assert tuple(found) == counts


def test_two_stage_counts() -> None:
    """K = 96: 111,744 numbers in the second stage, 150,144 with the LayerNorms of the first (0.175 %)."""
    with torch.device("meta"):
        model = petl.inject(timm.create_model("vit_base_patch16_224"), petl.TTC(k=96), num_classes=100)
    assert petl.trainable_parameters(model) == 111_744
    assert petl.delta_parameters(model) == 150_144
    assert petl.delta_parameters(model, head=True) == 150_144 + 76_900
    assert percentage(model) == pytest.approx(0.175, abs=5e-4)
    assert "25 x LayerNorm (kept): 38,400" in petl.describe(model)
    assert "150,144 of 85,798,656 (0.175 %)" in petl.describe(model)


def test_global_allocation_may_leave_a_block_without_channels(images: torch.Tensor) -> None:
    model = petl.inject(tiny_vit(), petl.TTC([[], [1, 5, 7]], init="trunc"))
    assert list(model.tuning) == ["blocks_1_attn"]
    assert petl.trainable_parameters(model) == 3 * 3 + 3
    assert model(images).shape == (4, 5)


@pytest.mark.parametrize("channels", [[[3, 1], [0, 1]], [[0, 24], [0, 1]], [[1, 1], [0, 1]], [[0, 1]]])
def test_wrong_channels(channels: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="channels"):
        petl.inject(tiny_vit(), petl.SCT(channels))


def test_scale_on_input() -> None:
    """``s x + f(x)`` on the channels, as SCT's Swin has it."""
    module = petl.ChannelTuning([1, 3], 6, scale=0.4, scale_on="input")
    x = torch.randn(2, 5, 6)
    expected = x.clone()
    expected[..., [1, 3]] = 0.4 * x[..., [1, 3]] + module.update(x[..., [1, 3]])
    torch.testing.assert_close(module(x), expected)
    product, shift = module.matrix()
    torch.testing.assert_close(x + x @ product.T + shift, expected)


def test_channels_on_another_axis() -> None:
    last, first = petl.ChannelTuning([0, 2], 4), petl.ChannelTuning([0, 2], 4, axis=1)
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(first(x.movedim(-1, 1)), last(x).movedim(-1, 1))


def test_frozen_mode(images: torch.Tensor) -> None:
    """Stochastic depth of the frozen network acts in training, unless it is asked to stay out."""
    for mode, changes in (("train", True), ("eval", False)):
        model = petl.inject(tiny_vit(drop_path_rate=0.9), petl.LNTune(), frozen_mode=mode)
        model.eval()
        still = model(images)
        model.train()
        torch.manual_seed(3)
        assert torch.equal(model(images), still) is not changes


@pytest.mark.parametrize("name", ["adapter", "adaptformer", "lora"])
def test_released_initialisation_is_not_the_identity(name: str, images: torch.Tensor) -> None:
    """timm's initialisation of the whole model overwrites the zeros of the released baselines (section 10, 3)."""
    method = METHODS[name]()
    method.init = "released"
    model = petl.inject(tiny_vit(), method)
    assert not starts_as_backbone(method)
    weights = [p for p in model.tuning.parameters() if p.ndim > 1]
    assert all(0.01 < float(p.std()) < 0.03 for p in weights)


def test_prompts_are_dropped_between_blocks(images: torch.Tensor) -> None:
    """Deep prompts: every block sees its own, none of the block before, and the norm sees none."""
    model = petl.inject(tiny_vit(), petl.VPT(3, dropout=0.0))
    lengths: list[int] = []
    for block in model.backbone.blocks:
        block.norm1.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.backbone.norm.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model(images)
    assert lengths == [20, 20, 17]


def test_a_second_method_is_refused() -> None:
    model = tuned("vit", "lora")
    with pytest.raises(ValueError, match=r"petl.Together"):
        petl.inject(model.backbone, petl.SSF())


@pytest.mark.parametrize(
    "build",
    [
        lambda: petl.LoRA(targets=("x",)),
        lambda: petl.LoRA(targets=("q",), packed=True),
        lambda: petl.FacT("cp"),
        lambda: petl.SCT(site="head"),
        lambda: petl.LNTune("scale"),
        lambda: petl.Adapter(place="head"),
        lambda: petl.Adapter(act="tanh"),
        lambda: petl.VPT(0),
        lambda: petl.Partial(0),
        lambda: petl.inject(tiny_vit(), petl.Partial(3)),
        lambda: petl.inject(tiny_vit(), petl.LoRA(layers=[2])),
        lambda: petl.inject(tiny_vit(), petl.LoRA(layers="middle")),
        lambda: petl.inject(tiny_vit(), petl.Linear(), head_init="ones"),
        lambda: petl.inject(tiny_vit(), petl.Linear(), frozen_mode="half"),
        lambda: petl.NOAHSubnet([1], [1, 2], [1]),
    ],
)
def test_wrong_settings(build: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        build()


@pytest.mark.parametrize("name", ["lora", "ttc", "convpass", "fact_tk", "vpt_deep", "ssf", "repadapter"])
def test_copies_are_independent(name: str, images: torch.Tensor) -> None:
    """A deep copy and a pickle call their own modules, not the original's."""
    model = disturbed(tuned("vit", name)).eval()
    expected = model(images)
    file = io.BytesIO()
    pickle.dump(model, file)
    for other in (copy.deepcopy(model), pickle.loads(file.getvalue())):
        assert torch.equal(other(images), expected)
        disturbed(other, seed=2)
        assert not torch.equal(other(images), expected)
        assert torch.equal(model(images), expected)


def test_gradient_checkpointing(images: torch.Tensor) -> None:
    """Recomputed blocks give the same gradients, hooks included."""
    grads = []
    for checkpointing in (False, True):
        model = disturbed(tuned("vit", "ttc")).train()
        model.backbone.set_grad_checkpointing(checkpointing)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.tuning.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_conv_mlp(images: torch.Tensor) -> None:
    """ConvNeXt with 1 x 1 convolutions has its channels on axis 1."""
    model = petl.inject(tiny_convnext(conv_mlp=True), petl.SCT(k=4, site="mlp"), num_classes=5)
    assert model(images).shape == (4, 5)


def test_counts_of_the_golden_file() -> None:
    """One row by hand, so that the inventory of tests/parity is not the only witness."""
    content = json.loads((Path(__file__).parents[1] / "parity/cases/petl/param_counts.json").read_text())
    counts = content["vit_base_patch16_224"]["trainable_without_head"]
    assert counts["convpass_8"] == 12 * 2 * (768 * 8 + 8 + 8 * 8 * 9 + 8 + 8 * 768 + 768)
