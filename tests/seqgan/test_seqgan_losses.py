"""Adversarial, transformer and perceptual losses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16 as torchvision_vgg16

from core.errors import ConfigError
from seqgan.losses.perceptual import LPIPS, SemanticPerceptualLoss, TappedNetwork, classifier, vgg16
from seqgan.losses.terms import (
    adaptive_weight,
    autoregressive_loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    masked_loss,
    started,
)


def images(seed: int, size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small() -> TappedNetwork:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.LazyLinear(7)
    )
    network(images(0))
    return TappedNetwork(network, {"conv": "0", "relu": "1", "logit": ""})


def semantic(alpha: float = 1.0, **options) -> SemanticPerceptualLoss:
    return SemanticPerceptualLoss(small(), alpha, low=("conv", "relu"), semantic=("relu", "logit"), **options)


# ------------------------------------------------------------------ adversarial


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_both_players_want_opposite_things(kind: str) -> None:
    good, bad = torch.full((4,), 2.0), torch.full((4,), -2.0)
    assert discriminator_loss(good, bad, kind) < discriminator_loss(bad, good, kind)
    assert generator_loss(good, kind) < generator_loss(bad, kind)
    half, whole = (discriminator_loss(bad, good, kind, factor).item() for factor in (0.5, 1.0))
    assert whole == pytest.approx(2 * half)
    with pytest.raises(ValueError, match="unknown adversarial loss"):
        generator_loss(good, "wasserstein")


def test_adaptive_weight_makes_gradients_equally_long() -> None:
    layer = nn.Linear(3, 3)
    out = layer(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    first, second = out.square().mean(), 7 * out.mean()
    weight = adaptive_weight(first, second, layer.weight, 1.0)
    lengths = [
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (first, weight * second)
    ]
    assert lengths[0].item() == pytest.approx(lengths[1].item(), rel=1e-3) and not weight.requires_grad
    assert adaptive_weight(first, 0 * second, layer.weight, 0.8, limit=2.0).item() == pytest.approx(1.6)
    assert adaptive_weight(0 * first, 0 * second, layer.weight).item() == 0


def test_the_adversarial_loss_starts_and_ramps() -> None:
    assert [started(step, 5) for step in (4, 5, 6)] == [0, 1, 1]
    assert [started(step, 5, 0.8, ramp=3) for step in (4, 5, 8, 9)] == pytest.approx([0, 0.2, 0.8, 0.8])


def test_gradient_penalty_of_a_linear_critic_is_its_squared_length() -> None:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    penalty = gradient_penalty(critic, torch.randn(3, 3, 2, 2))
    assert penalty.item() == pytest.approx(critic[1].weight.square().sum().item(), rel=1e-5)
    penalty.backward()
    assert critic[1].weight.grad.abs().sum() > 0


# ------------------------------------------------------------------ transformers


def test_transformer_losses_in_nats() -> None:
    codes = torch.tensor([[1, 0, 2], [3, 3, 1]])
    assert autoregressive_loss(torch.zeros(2, 3, 4), codes).item() == pytest.approx(math.log(4))
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert masked_loss(torch.zeros(2, 3, 4), codes, mask).item() == pytest.approx(math.log(4))


def test_only_masked_codes_count_and_images_weigh_alike() -> None:
    codes = torch.tensor([[1, 0, 2], [3, 3, 1]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    logits = torch.zeros(2, 3, 4)
    logits[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    value = masked_loss(logits, codes, mask, 0.0)
    one = -torch.log_softmax(logits[0, 0], 0)[1].item()
    assert value.item() == pytest.approx((one + math.log(4)) / 2, rel=1e-5)
    logits[0, 1:] = torch.randn(2, 4)
    assert torch.equal(masked_loss(logits, codes, mask, 0.0), value)


def test_smoothing_spreads_a_share_over_all_codes() -> None:
    logits = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    codes, mask = torch.tensor([[1, 3]]), torch.ones(1, 2, dtype=torch.bool)
    logs = logits.log_softmax(dim=-1)
    expected = -(0.9 * logs.gather(-1, codes[..., None])[..., 0] + 0.1 * logs.mean(dim=-1)).mean()
    assert masked_loss(logits, codes, mask).item() == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------ perceptual


def test_alpha_mixes_linearly() -> None:
    a, b = images(1), images(2)
    values = [semantic(alpha)(a, b)[0].item() for alpha in (0.0, 0.25, 1.0)]
    assert values[1] == pytest.approx(0.75 * values[0] + 0.25 * values[2], rel=1e-5) and values[0] != values[2]
    _, terms = semantic(0.0)(a, b)
    assert terms["low"].item() == pytest.approx((terms["conv"] + terms["relu"]).item())
    assert terms["semantic"].item() == pytest.approx((terms["relu"] + terms["logit"]).item())


def test_gradients_reach_the_reconstruction_only() -> None:
    loss, passes = semantic(0.5), []
    loss.network.register_forward_hook(lambda module, inputs, output: passes.append(torch.is_grad_enabled()))
    a, b = images(1).requires_grad_(), images(2).requires_grad_()
    loss.train()(a, b)[0].backward()
    assert a.grad.abs().sum() > 0 and b.grad is None
    assert passes == [False, True] and not loss.network.training
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


def test_equal_images_cost_nothing_and_scales_divide() -> None:
    assert semantic()(images(1), images(1))[0].item() == 0
    plain, scaled = semantic()(images(1), images(2))[1], semantic(scales={"logit": 4.0})(images(1), images(2))[1]
    assert scaled["logit"].item() == pytest.approx(plain["logit"].item() / 4)
    with pytest.raises(ValueError, match="no taps"):
        semantic(scales={"relu9_9": 1.0})


def test_activations_are_read_before_they_change_in_place() -> None:
    assert (small()(images(1))["conv"] < 0).any()


def test_another_loss_in_place_of_the_low_taps() -> None:
    class L1(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs()

    value, terms = semantic(0.0, low_loss=L1())(images(1), images(2))
    assert value.item() == pytest.approx((images(1) - images(2)).abs().mean().item()) and "conv" not in terms


@pytest.mark.long
def test_vgg16_is_read_from_a_file(tmp_path: Path) -> None:
    network = torchvision_vgg16()
    network.features[0].bias.data.fill_(0.125)
    state = network.state_dict()
    for name in [name for name in state if name.startswith("classifier") and name.endswith("weight")]:
        state[name] = torch.zeros(1, dtype=torch.uint8).expand(state[name].shape)  # 120 million that no test needs
    torch.save(state, tmp_path / "vgg16.pth")
    tapped = vgg16(tmp_path / "vgg16.pth")
    assert (tapped.network.features[0].bias == 0.125).all()
    out = tapped(images(1, 32))
    assert {name: value.shape[1] for name, value in out.items()} == {
        "relu1_2": 64,
        "relu2_2": 128,
        "relu3_3": 256,
        "relu4_3": 512,
        "relu5_3": 512,
        "logit": 1000,
    }
    with pytest.raises(ConfigError, match="no weights file"):
        vgg16(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("library", "name", "tap"), [("torchvision", "squeezenet1_1", "features.3"), ("timm", "test_vit", "blocks.0")]
)
def test_any_classifier_is_a_semantic_network(library: str, name: str, tap: str) -> None:
    network = classifier(library, name, None, {"early": tap, "logit": ""}, image_size=160, num_classes=5)
    out = network(images(1, 64))
    assert out["logit"].shape == (2, 5)
    loss = SemanticPerceptualLoss(network, 1.0, low=(), semantic=("early", "logit"))
    assert loss(images(1, 64), images(2, 64))[0] > 0
    with pytest.raises(ValueError, match="has no module"):
        classifier(library, name, None, {"x": "nowhere.1"})
    with pytest.raises(ValueError, match="unknown library"):
        classifier("keras", name, None, {})


@pytest.mark.long
def test_lpips_reads_learned_weights(tmp_path: Path) -> None:
    state = {f"lin{i}.model.1.weight": torch.zeros(1, w, 1, 1) for i, w in enumerate((64, 128, 256, 512, 512))}
    torch.save(state, tmp_path / "vgg.pth")
    assert LPIPS(linear=tmp_path / "vgg.pth")(images(1), images(2)).abs().max() == 0
    state.pop("lin3.model.1.weight")
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="lin3"):
        LPIPS(linear=tmp_path / "vgg.pth")
