"""Moving averages of weights: closed forms, buffers, precision, targets, state, and the hook."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.engine.hooks.ema import EMAHook, batch_size
from core.errors import ConfigError
from core.optim.ema import EMA, AveragedNetwork, half_life_decay, ratio_decay
from core.optim.wrapper import OptimWrapper, OptimWrapperDict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))


def average(ema: EMA, name: str = "linear.weight") -> Tensor:
    return ema.state_dict()["average"][name].clone()


# ---------------------------------------------------------------------- laws
def test_half_life_with_a_ramp_as_in_the_video_gan() -> None:
    # PV3D: batch 16, h = min(16 * 10 / 32 * 1000, 0.05 n); n videos seen before the update
    golden = {0: 0.0, 16: 9.5367432e-07, 1600: 0.87055057, 20000: 0.98897094, 4000000: 0.99778438}
    for seen, beta in golden.items():
        assert half_life_decay(seen, 16, 5000.0, 0.05) == pytest.approx(beta, rel=1e-6)
    assert half_life_decay(0, 1000, 1000.0) == 0.5


def test_ratio_warm_up() -> None:
    assert [ratio_decay(t, 0.99) for t in (1, 8, 1000)] == pytest.approx([2 / 11, 0.5, 0.99])


# ---------------------------------------------------------------------- averaging
def test_constant_decay_in_closed_form() -> None:
    net = Net()
    ema = EMA(net, 0.9)
    seen = [net.linear.weight.detach().clone()]
    for _ in range(5):
        perturb(net)
        ema.update()
        seen.append(net.linear.weight.detach().clone())
    want = 0.9**5 * seen[0] + sum(0.1 * 0.9 ** (5 - t) * seen[t] for t in range(1, 6))
    torch.testing.assert_close(average(ema), want)
    assert set(ema.state_dict()["average"]) == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}


def test_ratio_warm_up_and_half_life_reach_the_weights() -> None:
    net = Net()
    warm, ramped = EMA(net, 0.999, warmup="ratio"), EMA(net, half_life=100.0, ramp=0.05)
    want_warm = want_ramped = net.linear.weight.detach().clone()
    for t in range(1, 4):
        perturb(net)
        w = net.linear.weight.detach()
        warm.update()
        ramped.update(batch=8)
        decay = (1 + t) / (10 + t)
        want_warm = decay * want_warm + (1 - decay) * w
        decay = half_life_decay(8 * (t - 1), 8, 100.0, 0.05)
        want_ramped = decay * want_ramped + (1 - decay) * w
    torch.testing.assert_close(average(warm), want_warm)
    torch.testing.assert_close(average(ramped), want_ramped)
    with pytest.raises(ConfigError, match="number of samples"):
        ramped.update()


def test_every_nth_update_counts_all_samples() -> None:
    net = Net()
    ema = EMA(net, half_life=10.0, every=2)
    start = net.linear.weight.detach().clone()
    perturb(net)
    ema.update(batch=4)
    torch.testing.assert_close(average(ema), start)
    perturb(net)
    ema.update(batch=6)
    torch.testing.assert_close(average(ema), 0.5 * start + 0.5 * net.linear.weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_a_float32_average(dtype: torch.dtype) -> None:
    net = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.zeros_(net.weight)
    ema = EMA(net, 0.999)
    nn.init.ones_(net.weight)
    for _ in range(100):  # in bfloat16 itself these increments would round away
        ema.update()
    assert average(ema, "weight").dtype == torch.float32
    assert average(ema, "weight").item() == pytest.approx(1 - 0.999**100, rel=1e-4)
    with ema.swapped():
        assert net.weight.dtype == dtype
        assert net.weight.item() == pytest.approx(1 - 0.999**100, rel=1e-2)
    assert net.weight.item() == 1.0
    assert average(ema, "weight").item() == pytest.approx(1 - 0.999**100, rel=1e-4), "swapping must not round it"


def test_swapping_gives_the_averaged_weights_and_every_bit_back() -> None:
    net = Net()
    ema = EMA(net, 0.5)
    start = copy.deepcopy(net.state_dict())
    perturb(net)
    trained = copy.deepcopy(net.state_dict())
    ema.update()
    with pytest.raises(ZeroDivisionError), ema.swapped() as same:
        assert same is net and ema.swapped_in
        torch.testing.assert_close(net.linear.weight.detach(), (start["linear.weight"] + trained["linear.weight"]) / 2)
        assert torch.equal(net.frozen.weight, trained["frozen.weight"]), "frozen weights are not averaged"
        with pytest.raises(RuntimeError, match="averaged weights"):
            ema.update()
        raise ZeroDivisionError
    assert all(torch.equal(v, trained[k]) for k, v in net.state_dict().items())
    with pytest.raises(RuntimeError, match="not in the module"):
        ema.swap_out()


# ---------------------------------------------------------------------- buffers and targets
@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
def test_buffers(buffers: str) -> None:
    net = Net()
    shadow = copy.deepcopy(net)
    ema = EMA(net, 0.75, target=shadow, buffers=buffers)
    net(torch.randn(8, 3) + 5)
    ema.update()
    mean = net.norm.running_mean
    want = {"copy": mean, "average": 0.25 * mean, "keep": torch.zeros(2)}[buffers]
    torch.testing.assert_close(shadow.norm.running_mean, want)
    assert shadow.norm.num_batches_tracked == (0 if buffers == "keep" else 1)


def test_averaged_buffers_are_swapped_with_the_weights() -> None:
    net = Net()
    ema = EMA(net, 0.75, buffers="average")
    net(torch.randn(8, 3) + 5)
    mean = net.norm.running_mean.clone()
    ema.update()
    with ema.swapped():
        torch.testing.assert_close(net.norm.running_mean, 0.25 * mean)
    assert torch.equal(net.norm.running_mean, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_is_a_network_of_its_own(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    copy_ = copy.deepcopy(net)
    ema = EMA(net, 0.5, target=copy_)
    start = net.linear.weight.detach().clone().float()
    perturb(net)
    ema.update()
    want = (0.5 * start + 0.5 * net.linear.weight.detach().float()).to(dtype)
    torch.testing.assert_close(copy_.linear.weight.detach(), want)
    assert not any(p.requires_grad for p in copy_.parameters())
    held_here = set(ema.state_dict()["average"])
    assert held_here == (set() if dtype == torch.float32 else {n for n, _ in net.named_parameters()})
    with pytest.raises(ConfigError, match="differs from the module"):
        EMA(net, 0.5, target=nn.Linear(3, 2))


class Holder(nn.Module):
    """A trainer with a generator and its average."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = Net()
        self.average = AveragedNetwork(self.generator, half_life=50.0, ramp=0.5)


def test_an_averaged_network_travels_in_its_trainers_state() -> None:
    batches = [torch.randn(4, 3) for _ in range(6)]

    def go(holder: Holder, some: list[Tensor]) -> None:
        holder.train()
        optimizer = torch.optim.SGD(holder.generator.parameters(), lr=0.1)
        for batch in some:
            holder.generator(batch).pow(2).mul(torch.arange(2.0)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            holder.average.update(batch=4)

    one = Holder()
    assert not any(p.requires_grad for p in one.average.parameters())
    go(one, batches[:3])
    saved = copy.deepcopy(one.state_dict())
    go(one, batches[3:])
    other = Holder()
    other.load_state_dict(saved)
    go(other, batches[3:])
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    assert one.average.ema.samples == 24
    assert not one.average.network.norm.training and one.generator.norm.training
    assert not torch.equal(one.average.network.linear.weight, one.generator.linear.weight)
    torch.testing.assert_close(one.average(batches[0]), one.average.network(batches[0]))
    del saved["average.counters"]
    with pytest.raises(RuntimeError, match=r"average\.counters"):
        other.load_state_dict(saved)


def test_an_averaged_network_follows_its_trainer_when_every_tensor_is_replaced() -> None:
    holder = Holder().double()  # replaces every tensor, as moving to a device does
    perturb(holder.generator)
    holder.average.update(batch=4)
    weight = holder.average.network.linear.weight
    assert weight.dtype == torch.float64
    assert torch.equal(weight, holder.generator.linear.weight), "the ramp's first average is the weights"


# ---------------------------------------------------------------------- state
@pytest.mark.parametrize(
    "options", [{"decay": 0.9}, {"decay": 0.999, "warmup": "ratio", "every": 2}, {"half_life": 50.0, "ramp": 0.1}]
)
def test_resume_is_bit_exact(options: dict[str, Any]) -> None:
    net = Net()
    ema = EMA(net, **options)
    steps = [copy.deepcopy(net.state_dict()) for _ in range(7) if perturb(net) is None]

    def go(ema: EMA, module: nn.Module, some: list[dict]) -> None:
        for state in some:
            module.load_state_dict(state)
            ema.update(batch=4)

    net = Net()
    ema = EMA(net, **options)
    go(ema, net, steps[:3])
    saved = copy.deepcopy(ema.state_dict())
    go(ema, net, steps[3:])

    other = Net()
    resumed = EMA(other, **options)
    resumed.load_state_dict(saved)
    go(resumed, other, steps[3:])
    assert all(torch.equal(a, resumed.state_dict()["average"][n]) for n, a in ema.state_dict()["average"].items())


def test_tied_parameters_are_listed_under_each_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)
            self.decoder.weight = self.encoder.weight

    net = Tied()
    ema = EMA(net, 0.5)
    perturb(net)
    ema.update()
    state = ema.state_dict()
    assert set(state["average"]) == set(net.state_dict())
    assert torch.equal(state["average"]["decoder.weight"], state["average"]["encoder.weight"])
    ema.load_state_dict(state)
    loaded = Tied()
    loaded.load_state_dict(state["average"])
    assert torch.equal(loaded.encoder.weight, state["average"]["encoder.weight"])


def test_a_state_of_another_module_is_refused() -> None:
    state = EMA(nn.Linear(3, 2), 0.9).state_dict()
    with pytest.raises(ConfigError, match=r"only there \['bias'\]"):
        EMA(nn.Linear(3, 2, bias=False), 0.9).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"'weight' is \(2, 3\) in the checkpoint, \(2, 4\) here"):
        EMA(nn.Linear(4, 2), 0.9).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either decay or half_life"),
        ({"decay": 0.9, "half_life": 5.0}, "either decay or half_life"),
        ({"decay": 1.5}, "between 0 and 1"),
        ({"half_life": -1.0}, "not positive"),
        ({"decay": 0.9, "ramp": 0.1}, "ramp belongs to half_life"),
        ({"decay": 0.9, "warmup": "ration"}, "did you mean 'ratio'"),
        ({"decay": 0.9, "every": 0}, "positive number"),
        ({"decay": 0.9, "buffers": "copied"}, "did you mean 'copy'"),
    ],
)
def test_what_cannot_be_meant_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EMA(Net(), **options)
    with pytest.raises(ConfigError, match=message):
        EMAHook(**options)


# ---------------------------------------------------------------------- the hook
def runner_of(model: nn.Module, **options: Any) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return SimpleNamespace(model=model, optim_wrapper=OptimWrapper(torch.optim.SGD(trained, lr=0.1), **options))


def iterate(hook: EMAHook, runner: Any, batches: list[dict]) -> None:
    for index, batch in enumerate(batches):
        runner.optim_wrapper.update_params(runner.model(batch["image"]).square().mean())
        hook.after_train_iter(runner, index, batch, {})


def images(count: int) -> list[dict]:
    return [{"image": torch.randn(4, 3), "sample_id": ["a", "b", "c", "d"]} for _ in range(count)]


def test_the_hook_averages_after_updates_not_micro_steps() -> None:
    model = Net()
    runner = runner_of(model, accumulative_counts=2)
    hook = EMAHook(half_life=100.0)
    hook.before_train(runner)
    want = model.linear.weight.detach().clone()
    for index, batch in enumerate(images(6)):
        iterate(hook, runner, [batch])
        if index % 2:
            decay = 0.5 ** (8 / 100)  # two micro-batches of four
            want = decay * want + (1 - decay) * model.linear.weight.detach()
        torch.testing.assert_close(average(hook.ema), want)
    assert hook.ema.updates == 3


def test_evaluation_sees_the_average_and_training_goes_on_with_its_own() -> None:
    model = Net()
    runner = runner_of(model)
    hook = EMAHook(decay=0.5)
    hook.before_train(runner)
    iterate(hook, runner, images(3))
    trained = copy.deepcopy(model.state_dict())
    for split in ("val", "test"):
        getattr(hook, f"before_{split}_epoch")(runner)
        assert torch.equal(model.linear.weight, average(hook.ema))
        assert not torch.equal(model.linear.weight, trained["linear.weight"])
        getattr(hook, f"after_{split}_epoch")(runner, {})
        assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_holds_trained_and_averaged_weights_by_the_same_names() -> None:
    model = Net()
    runner = runner_of(model)
    hook = EMAHook(decay=0.5)
    hook.before_train(runner)
    iterate(hook, runner, images(3))
    assert set(hook.state_dict()["average"]) < set(model.state_dict())


def test_the_hook_resumes_exactly() -> None:
    batches = images(7)
    start = Net()

    def begin(state: dict | None = None, hook_state: dict | None = None, optim: dict | None = None) -> tuple:
        model = copy.deepcopy(start)
        runner = runner_of(model, accumulative_counts=2)
        hook = EMAHook(half_life=30.0, ramp=0.5)
        if state is not None:
            model.load_state_dict(state)
            runner.optim_wrapper.load_state_dict(optim)
            hook.load_state_dict(hook_state)
            assert hook.state_dict().keys() == hook_state.keys(), "saved again before training begins"
        hook.before_train(runner)
        return hook, runner

    hook, runner = begin()
    iterate(hook, runner, batches[:3])  # in the middle of an accumulation window
    saved = copy.deepcopy((runner.model.state_dict(), hook.state_dict(), runner.optim_wrapper.state_dict()))
    iterate(hook, runner, batches[3:])
    resumed, second = begin(*saved)
    iterate(resumed, second, batches[3:])
    assert torch.equal(average(resumed.ema), average(hook.ema))
    assert (resumed.ema.updates, resumed.ema.samples) == (hook.ema.updates, hook.ema.samples) == (3, 24)


def test_the_hook_begins_from_the_weights_as_loaded() -> None:
    model = Net()
    hook, runner = EMAHook(decay=1.0), runner_of(model)
    perturb(model)  # weights are loaded after the hook is made
    hook.before_train(runner)
    loaded = model.linear.weight.detach().clone()
    iterate(hook, runner, images(2))
    assert torch.equal(average(hook.ema), loaded)


def test_evaluation_alone_uses_a_restored_average_and_leaves_loaded_weights_without_one() -> None:
    model = Net()
    runner = runner_of(model)
    hook = EMAHook(decay=0.5)
    hook.before_train(runner)
    iterate(hook, runner, images(2))
    evaluating = EMAHook(decay=0.5)
    evaluating.load_state_dict(hook.state_dict())
    alone = SimpleNamespace(model=copy.deepcopy(model))
    evaluating.before_test_epoch(alone)
    assert torch.equal(alone.model.linear.weight, average(hook.ema))
    untouched = EMAHook(decay=0.5)
    untouched.before_test_epoch(SimpleNamespace(model=model))
    untouched.after_test_epoch(SimpleNamespace(model=model), {})
    assert untouched.state_dict() == {}


def test_several_optimizers_and_foreign_wrappers() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    wrappers = OptimWrapperDict(**{n: OptimWrapper(torch.optim.SGD(m.parameters(), lr=0.1)) for n, m in model.items()})
    runner = SimpleNamespace(model=model, optim_wrapper=wrappers)
    hook = EMAHook(decay=0.5)
    hook.before_train(runner)
    for wrapper, network in zip(wrappers.values(), model.values(), strict=True):
        wrapper.update_params(network(torch.ones(1, 3)).sum())
    hook.after_train_iter(runner, 0, images(1)[0], {})
    assert hook.ema.updates == 1
    with pytest.raises(ConfigError, match="counts updates"):
        EMAHook(decay=0.5).before_train(SimpleNamespace(model=model, optim_wrapper=object()))


def test_batch_sizes() -> None:
    assert batch_size({"video": torch.zeros(5, 3), "sample_id": ["a"] * 5}) == 5
    assert batch_size({"meta": "x", "image": torch.zeros(3, 2)}) == 3
    assert batch_size([torch.zeros(2, 2), torch.zeros(2)]) == 2
    assert batch_size(None) == 0
