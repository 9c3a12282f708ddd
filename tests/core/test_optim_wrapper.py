"""One optimizer wrapper: accumulation, precision, cleaning, clipping, and its state."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.optim.wrapper import OptimWrapper, OptimWrapperDict


def linear(width: int = 4) -> nn.Linear:
    return nn.Linear(width, 3)


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> OptimWrapper:
    return OptimWrapper(torch.optim.SGD(model.parameters(), lr=lr), **options)


def adam(model: nn.Module, **options: Any) -> OptimWrapper:
    return OptimWrapper(torch.optim.AdamW(model.named_parameters(), lr=0.01), **options)


def train(model: nn.Module, wrapper: OptimWrapper, batches: list[Tensor]) -> None:
    for batch in batches:
        with wrapper.optim_context(model):
            loss = model(batch).square().mean()
        wrapper.update_params(loss)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_accumulated_micro_batches_train_like_the_big_batch_even_in_the_last_short_window() -> None:
    micro = [torch.randn(2, 4) for _ in range(8)]  # windows of 3, 3 and 2
    one = linear()
    other = copy.deepcopy(one)
    accumulating = adam(one, accumulative_counts=3, clip_grad={"max_norm": 0.01})
    accumulating.initialize_count_status(one, 0, len(micro))
    train(one, accumulating, micro)
    whole = adam(other, clip_grad={"max_norm": 0.01})
    train(other, whole, [torch.cat(micro[i : i + 3]) for i in (0, 3, 6)])
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-5, atol=1e-7)
    assert accumulating.updates == whole.updates == 3
    torch.testing.assert_close(accumulating.grad_norm, whole.grad_norm)


def test_clipping_sees_the_whole_gradient_and_not_its_parts() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    wrapper = sgd(model, lr=1.0, accumulative_counts=2, clip_grad={"max_norm": 1.0})
    for target in (10.0, -9.0):  # gradients -10 and 9: their mean, -0.5, needs no clipping; clipped parts would cancel
        wrapper.update_params(target * -model(torch.ones(1, 1)).sum())
    assert wrapper.grad_norm.item() == pytest.approx(0.5)
    assert model.weight.item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("norm_type", "norm"), [(math.inf, 4.0), ("inf", 4.0), (1, 8.0), (2, math.sqrt(26))])
def test_clipping_by_any_norm(norm_type: Any, norm: float) -> None:
    model = nn.Linear(3, 1, bias=False)
    start = model.weight.detach().clone()
    wrapper = sgd(model, lr=1.0, clip_grad={"max_norm": 1.0, "norm_type": norm_type})
    wrapper.update_params(model(torch.tensor([[3.0, -4.0, 1.0]])).sum())
    assert wrapper.grad_norm.item() == pytest.approx(norm)
    torch.testing.assert_close(start - model.weight, torch.tensor([[3.0, -4.0, 1.0]]) / norm, rtol=1e-4, atol=1e-6)


def test_clipping_by_value() -> None:
    model = nn.Linear(3, 1, bias=False)
    start = model.weight.detach().clone()
    wrapper = sgd(model, lr=1.0, clip_grad={"type": "value", "clip_value": 2})
    wrapper.update_params(model(torch.tensor([[3.0, -4.0, 1.0]])).sum())
    torch.testing.assert_close(start - model.weight, torch.tensor([[2.0, -2.0, 1.0]]))
    assert wrapper.log_vars() == {}


def test_an_infinite_maximum_measures_without_clipping() -> None:
    model = linear()
    wrapper = sgd(model, clip_grad={"max_norm": math.inf})
    before = copy.deepcopy(model)
    batch = torch.randn(5, 4)
    train(model, wrapper, [batch])
    train(before, sgd(before), [batch])
    torch.testing.assert_close(weights(model), weights(before))
    norm = wrapper.log_vars()["grad_norm"]
    assert isinstance(norm, Tensor) and norm.ndim == 0 and norm > 0


def test_cleaning_replaces_only_the_entries_it_is_told_about() -> None:
    model = nn.Linear(4, 1, bias=False)
    entries = torch.tensor([[math.nan, math.inf, -math.inf, 2.0]])

    def gradient(clean: dict[str, float] | None) -> Tensor:
        wrapper = sgd(model, lr=0.0, clean_gradients=clean)
        model.weight.grad = entries.clone()
        wrapper.step()
        return model.weight.grad

    torch.testing.assert_close(
        gradient({"nan": 0, "posinf": 1e5, "neginf": -1e5}), torch.tensor([[0.0, 1e5, -1e5, 2.0]])
    )
    torch.testing.assert_close(gradient({"nan": 0}), torch.tensor([[0.0, math.inf, -math.inf, 2.0]]))
    torch.testing.assert_close(gradient(None), entries, equal_nan=True)


def test_cleaning_comes_before_clipping() -> None:
    model = nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    wrapper = sgd(model, lr=1.0, clean_gradients={"nan": 0.0}, clip_grad={"max_norm": 1.0})
    model.weight.grad = torch.tensor([[math.nan, 4.0]])
    wrapper.step()
    torch.testing.assert_close(start - model.weight, torch.tensor([[0.0, 1.0]]), rtol=1e-5, atol=1e-6)


def test_a_non_finite_norm_can_stop_the_run() -> None:
    model = nn.Linear(2, 1, bias=False)
    wrapper = sgd(model, clip_grad={"max_norm": 1.0, "error_if_nonfinite": True})
    model.weight.grad = torch.tensor([[math.inf, 4.0]])
    with pytest.raises(FloatingPointError, match="update 0"):
        wrapper.step()


@pytest.mark.parametrize("clip", [None, {"max_norm": 1.0}])
def test_fp16_skips_an_overflown_step_lowers_the_scale_and_restores_it(clip: dict | None) -> None:
    model = linear()
    scale = {"init_scale": 1024.0, "growth_interval": 2}
    wrapper = sgd(model, precision="fp16", loss_scale=scale, clip_grad=clip)
    start = weights(model)
    with wrapper.optim_context(model):
        output = model(torch.randn(2, 4))
    assert output.dtype == torch.float16
    wrapper.update_params(output.float().sum() * math.inf)
    torch.testing.assert_close(weights(model), start, rtol=0, atol=0)
    assert wrapper.loss_scaler.get_scale() == 512.0
    train(model, wrapper, [torch.randn(2, 4)])
    assert any((a != b).any() for a, b in zip(weights(model), start, strict=True))

    state = wrapper.state_dict()
    fresh = sgd(model, precision="fp16", loss_scale=scale, clip_grad=clip)
    fresh.load_state_dict(state)
    assert fresh.loss_scaler.get_scale() == 512.0
    for each in (wrapper, fresh):  # the growth counter travels too: one more good step doubles the scale
        train(model, each, [torch.randn(2, 4)])
        assert each.loss_scaler.get_scale() == 1024.0


def test_fp16_clips_unscaled_gradients() -> None:
    model = nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    wrapper = sgd(model, lr=1.0, precision="fp16", loss_scale={"init_scale": 256.0}, clip_grad={"max_norm": 1.0})
    wrapper.update_params(model(torch.tensor([[3.0, 4.0]])).sum())
    assert wrapper.grad_norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(start - model.weight, torch.tensor([[0.6, 0.8]]), rtol=1e-4, atol=1e-6)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    model = linear()
    wrapper = sgd(model, precision="bf16")
    with wrapper.optim_context(model):
        output = model(torch.randn(2, 4))
    assert output.dtype == torch.bfloat16
    wrapper.update_params(output.float().square().mean())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert wrapper.loss_scaler is None


class CountsSyncs(nn.Module):
    """Stands where DistributedDataParallel would: counts forward passes within and outside of no_sync."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.quiet, self.synced, self.silent = linear(), 0, 0, False

    def no_sync(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def context() -> Any:
            self.silent = True
            yield
            self.silent = False

        return context()

    def forward(self, x: Tensor) -> Tensor:
        self.quiet += self.silent
        self.synced += not self.silent
        return self.network(x)


def test_gradients_are_averaged_only_in_the_last_micro_step_of_each_window() -> None:
    model = CountsSyncs()
    wrapper = sgd(model, accumulative_counts=3)
    wrapper.initialize_count_status(model, 0, 8)
    train(model, wrapper, [torch.randn(2, 4) for _ in range(8)])
    assert (model.quiet, model.synced) == (5, 3)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resuming_anywhere_in_a_window_is_bit_exact(stop: int, precision: str) -> None:
    batches = [torch.randn(2, 4) for _ in range(8)]
    start = linear()
    options: dict[str, Any] = {"accumulative_counts": 3, "precision": precision, "clip_grad": {"max_norm": 0.05}}
    if precision == "fp16":
        options["loss_scale"] = {"init_scale": 64.0, "growth_interval": 1}

    straight = copy.deepcopy(start)
    wrapper = adam(straight, **options)
    wrapper.initialize_count_status(straight, 0, 8)
    train(straight, wrapper, batches)

    first = copy.deepcopy(start)
    wrapper = adam(first, **options)
    wrapper.initialize_count_status(first, 0, 8)
    train(first, wrapper, batches[:stop])
    live = wrapper.state_dict()
    saved = copy.deepcopy({"model": first.state_dict(), "optim": live})
    given = copy.deepcopy(saved["optim"])
    train(first, wrapper, batches[stop:])
    for index, gradient in live["accumulation"]["gradients"].items():
        assert torch.equal(gradient, given["accumulation"]["gradients"][index]), "training on reached into the state"

    second = linear()
    second.load_state_dict(saved["model"])
    resumed = adam(second, **options)
    resumed.load_state_dict(saved["optim"])
    resumed.initialize_count_status(second, stop, 8)
    assert resumed.mid_window == (stop % 3 != 0)
    train(second, resumed, batches[stop:])
    torch.testing.assert_close(weights(second), weights(straight), rtol=0, atol=0)
    assert resumed.updates == 3
    assert all((a != b).all() for a, b in zip(weights(straight), weights(start), strict=True))
    assert given.keys() == saved["optim"].keys(), "load_state_dict changed its argument"


def test_a_checkpoint_within_a_window_of_another_length_is_refused() -> None:
    model = linear()
    wrapper = adam(model, accumulative_counts=3)
    train(model, wrapper, [torch.randn(2, 4)])
    with pytest.raises(ConfigError, match="resume with 3"):
        adam(model, accumulative_counts=2).load_state_dict(wrapper.state_dict())


def test_another_window_length_takes_over_between_two_updates() -> None:
    model = linear()
    wrapper = adam(model, accumulative_counts=3)
    train(model, wrapper, [torch.randn(2, 4)] * 3)
    resumed = adam(model, accumulative_counts=2)
    resumed.load_state_dict(wrapper.state_dict())
    resumed.initialize_count_status(model, 3, 7)
    train(model, resumed, [torch.randn(2, 4)] * 4)
    assert resumed.updates == 3 and not resumed.mid_window


def test_state_of_other_parameters_is_refused_by_name() -> None:
    class Net(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.add_module(name, linear())

    state = adam(Net("head")).state_dict()
    with pytest.raises(ConfigError, match=r"only saved: head\.bias.*only here: neck\.bias"):
        adam(Net("neck")).load_state_dict(state)


def test_configs_are_never_changed() -> None:
    clip, clean = {"type": "norm", "max_norm": 1.0}, {"nan": 0}
    wanted = copy.deepcopy((clip, clean))
    sgd(linear(), clip_grad=clip, clean_gradients=clean)
    sgd(linear(), clip_grad=clip, clean_gradients=clean)
    assert (clip, clean) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp61"}, "did you mean 'fp16'"),
        ({"accumulative_counts": 0}, "from 1 on"),
        ({"clip_grad": {"max_nrom": 1.0}}, "did you mean 'max_norm'"),
        ({"clip_grad": {"norm_type": 2}}, "needs max_norm"),
        ({"clip_grad": {"type": "values", "clip_value": 1}}, "neither 'norm' nor 'value'"),
        ({"clean_gradients": {"inf": 0}}, "no key 'inf'"),
        ({"loss_scale": {"init_scale": 2.0}}, "belongs to precision fp16"),
        ({"precision": "fp16", "clip_grad": {"max_norm": 1, "error_if_nonfinite": True}}, "overflows"),
    ],
)
def test_what_cannot_be_meant_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sgd(linear(), **options)


# ---------------------------------------------------------------------- several optimizers
def pair() -> tuple[nn.ModuleDict, OptimWrapperDict]:
    networks = nn.ModuleDict({"generator": linear(), "discriminator": nn.Linear(3, 1)})
    wrappers = {name: adam(network, clip_grad={"max_norm": 1.0}) for name, network in networks.items()}
    return networks, OptimWrapperDict(**wrappers)


def adversarial_step(networks: nn.ModuleDict, wrappers: OptimWrapperDict, batch: Tensor) -> None:
    for name, sign in (("generator", -1.0), ("discriminator", 1.0)):
        with wrappers.only(name), wrappers[name].optim_context(networks):
            loss = sign * networks["discriminator"](networks["generator"](batch)).mean()
        wrappers[name].update_params(loss)


def test_a_phase_trains_its_own_network_alone_through_the_other() -> None:
    networks, wrappers = pair()
    networks["generator"].bias.requires_grad_(False)  # frozen for good: a phase must not thaw it
    before = copy.deepcopy(networks)
    with wrappers.only("generator"), wrappers["generator"].optim_context(networks):
        loss = networks["discriminator"](networks["generator"](torch.randn(2, 4))).mean()
        wrappers["generator"].update_params(loss)
        assert all(p.grad is None for p in networks["discriminator"].parameters())
    assert (before["generator"].weight != networks["generator"].weight).any()
    torch.testing.assert_close(weights(before["discriminator"]), weights(networks["discriminator"]), rtol=0, atol=0)
    assert [p.requires_grad for p in networks.parameters()] == [True, False, True, True]


def test_gradient_flags_come_back_after_an_error() -> None:
    networks, wrappers = pair()
    with pytest.raises(ZeroDivisionError), wrappers.only("generator"):
        raise ZeroDivisionError
    assert all(p.requires_grad for p in networks.parameters())
    with pytest.raises(ConfigError, match="did you mean 'generator'"), wrappers.only("generatro"):
        pass


def test_every_optimizer_resumes_with_its_own_state() -> None:
    batches = [torch.randn(2, 4) for _ in range(6)]
    networks, wrappers = pair()
    start = copy.deepcopy(networks)
    for batch in batches[:3]:
        adversarial_step(networks, wrappers, batch)
    saved = copy.deepcopy({"model": networks.state_dict(), "optim": wrappers.state_dict()})
    assert set(wrappers.log_vars()) == {"generator.grad_norm", "discriminator.grad_norm"}
    for batch in batches[3:]:
        adversarial_step(networks, wrappers, batch)

    second, resumed = pair()
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optim"])
    for batch in batches[3:]:
        adversarial_step(second, resumed, batch)
    torch.testing.assert_close(weights(second), weights(networks), rtol=0, atol=0)
    assert resumed.updates == 6 and not resumed.mid_window
    assert any((a != b).any() for a, b in zip(weights(start), weights(second), strict=True))
    with pytest.raises(ConfigError, match="discriminator"):
        resumed.load_state_dict({"generator": saved["optim"]["generator"]})


def test_the_last_window_of_several_optimizers_is_exact_too() -> None:
    networks, _ = pair()
    wrappers = OptimWrapperDict(generator=sgd(networks["generator"], accumulative_counts=2))
    wrappers.initialize_count_status(networks, 0, 3)
    other = copy.deepcopy(networks["generator"])
    micro = [torch.randn(2, 4) for _ in range(3)]
    train(networks["generator"], wrappers["generator"], micro)
    train(other, sgd(other), [torch.cat(micro[:2]), micro[2]])
    torch.testing.assert_close(weights(networks["generator"]), weights(other), rtol=1e-5, atol=1e-7)
