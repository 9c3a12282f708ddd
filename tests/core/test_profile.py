"""Counting against hand counts, timing statistics, memory and the profiler's lists."""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import core.profile.measure
from core.profile.measure import (
    Benchmark,
    Spread,
    benchmark,
    count_macs,
    count_parameters,
    peak_memory,
    where_time_goes,
)

DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]


class Attention(nn.Module):
    """Bare scaled dot-product attention of `heads` heads, optionally masked."""

    def __init__(self, mask: str | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mask = None
        if self.mask == "bool":
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        elif self.mask == "additive":
            mask = torch.zeros(q.shape[-2], k.shape[-2], device=q.device)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=self.mask == "causal")


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


@pytest.mark.parametrize("device", DEVICES)
class TestMacs:
    def test_linear(self, device):
        layer = nn.Linear(8, 4, device=device)
        assert count_macs(layer, (torch.randn(2, 5, 8, device=device),)).total == 2 * 5 * 8 * 4

    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_convolution(self, device, groups):
        conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, device=device)
        macs = count_macs(conv, (torch.randn(2, 8, 10, 10, device=device),)).total
        assert macs == 2 * (5 * 5) * 16 * (8 // groups) * 9

    def test_depthwise_3d_and_transposed(self, device):
        conv = nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0), groups=6, device=device)
        assert count_macs(conv, (torch.randn(1, 6, 4, 5, 5, device=device),)).total == 4 * 25 * 6 * 3
        up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2, device=device)
        assert count_macs(up, (torch.randn(1, 8, 5, 5, device=device),)).total == 25 * 8 * (4 // 2) * 4

    @pytest.mark.parametrize("mask", [None, "bool", "additive", "causal"])
    def test_attention_counts_both_products(self, device, mask):
        keys = 5 if mask == "causal" else 7
        q, k = torch.randn(2, 3, 5, 8, device=device), torch.randn(2, 3, keys, 8, device=device)
        macs = count_macs(Attention(mask), (q, k))
        assert macs.total == 2 * (2 * 3 * 5 * keys * 8)
        assert set(macs.by_operator) == {"aten.bmm"}  # no kernel's own formula, which releases differ in

    def test_multi_head_attention_and_encoder_layer(self, device):
        x = torch.randn(2, 5, 8, device=device)
        attention = 2 * 5 * 8 * 24 + 2 * (2 * 2 * 5 * 5 * 4) + 2 * 5 * 8 * 8
        mha = nn.MultiheadAttention(8, 2, batch_first=True, device=device)
        assert count_macs(mha, {"query": x, "key": x, "value": x, "need_weights": False}).total == attention
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=device)
        assert count_macs(layer, (x,)).total == attention + 2 * (2 * 5 * 8 * 16)

    @pytest.mark.parametrize(
        ("equation", "shapes", "expected"),
        [
            ("bnc,bmc->bnm", [(2, 5, 8), (2, 6, 8)], 2 * 5 * 6 * 8),
            ("bhnd,hde->bhne", [(2, 3, 5, 4), (3, 4, 6)], 2 * 3 * 5 * 4 * 6),
            ("bnc,c->bn", [(2, 5, 8), (8,)], 2 * 5 * 8),
        ],
    )
    def test_einsum(self, device, equation, shapes, expected):
        tensors = tuple(torch.randn(s, device=device) for s in shapes)
        assert count_macs(Call(lambda *t: torch.einsum(equation, *t)), tensors).total == expected

    def test_matrix_and_vector_products(self, device):
        a, b, v = (torch.randn(s, device=device) for s in [(3, 4, 5), (3, 5, 6), (5,)])
        assert count_macs(Call(torch.bmm), (a, b)).total == 3 * 4 * 5 * 6
        assert count_macs(Call(torch.mv), (a[0], v)).total == 4 * 5
        assert count_macs(Call(torch.dot), (v, v)).total == 5
        assert count_macs(Call(torch.addmv), (a[0, :, 0], a[0], v)).total == 4 * 5
        assert count_macs(Call(torch.addbmm), (torch.zeros(4, 6, device=device), a, b)).total == 3 * 4 * 5 * 6

    def test_recurrent_layer(self, device):
        lstm = nn.LSTM(8, 6, batch_first=True, device=device)
        macs = count_macs(lstm, (torch.randn(2, 5, 8, device=device),))
        assert macs.total == 2 * 5 * (8 * 24 + 6 * 24)

    def test_breakdown_includes_children(self, device):
        net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))).to(device)
        macs = count_macs(net, (torch.randn(3, 4, device=device),))
        assert macs.by_module == {"0": 48, "1": 72 + 36, "1.0": 72, "1.1": 36}
        assert sum(macs.by_operator.values()) == macs.total == 156


def test_counting_leaves_the_module_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    net[1].eval()
    before = net[1].running_mean.clone()
    enabled = torch.backends.mha.get_fastpath_enabled()
    count_macs(net, (torch.randn(3, 4),))
    assert net.training
    assert net[0].training
    assert not net[1].training
    assert torch.equal(before, net[1].running_mean)
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_uncounted_operators_are_named():
    macs = count_macs(Call(lambda x: torch.fft.fft2(x) @ torch.ones(4, 4, dtype=torch.complex64)), (torch.randn(4, 4),))
    assert any("fft" in name for name in macs.uncounted)
    assert count_macs(nn.Linear(4, 4), (torch.randn(1, 4),)).uncounted == ()


def test_parameters_shared_and_frozen():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    assert count_parameters(net) == (9 + 3 + 3, 9 + 3)


def test_spread_is_the_quartiles():
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_ratio_is_taken_round_by_round():
    """A machine that slows down threefold half-way does not touch a ratio of neighbours."""
    result = Benchmark({"slow": (2.0, 2.0, 6.0, 6.0), "fast": (1.0, 1.0, 3.0, 3.0)})
    assert result.speedups("fast", over="slow") == [2.0, 2.0, 2.0, 2.0]
    assert result.speedup("fast", over="slow") == Spread(2.0, 2.0, 2.0)
    assert result.rate("fast", per_call=6).high == 6.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed calls move."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(core.profile.measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_candidates_take_turns_and_everything_is_restored(clock):
    calls: list[str] = []
    threads = torch.get_num_threads()

    def call(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            clock.now += seconds

        return run

    functions = {"a": call("a", 0.5), "b": call("b", 1.0)}
    result = benchmark(functions, repeats=4, warmup=1, min_time=0.0, threads=threads + 1)
    assert calls == ["a", "a", "b", "b"] + ["a", "b", "b", "a"] * 2  # warm-up, one to learn the length, then rounds
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert result.seconds == {"a": (0.5,) * 4, "b": (1.0,) * 4}
    assert result.speedup("a", over="b").median == 2.0


def test_short_calls_are_repeated_until_the_clock_can_see_them(clock):
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        clock.now += 2**-10

    result = benchmark(tick, repeats=3, warmup=0, min_time=2**-6)
    assert count == 1 + 3 * 16
    assert result.seconds["call"] == (2**-10,) * 3
    with pytest.raises(ValueError, match="at least one callable"):
        benchmark({})


def test_a_budget_ends_the_rounds_but_not_before_three(clock):
    def slow() -> None:
        clock.now += 10.0

    assert len(benchmark(slow, repeats=50, warmup=0, budget=1.0).seconds["call"]) == 3
    assert len(benchmark(slow, repeats=50, warmup=0, budget=65.0).seconds["call"]) == 7
    assert len(benchmark(slow, repeats=2, warmup=0, budget=1.0).seconds["call"]) == 2


def test_peak_memory_of_tensors():
    size = 8 * 2**20

    def work() -> None:
        a = torch.ones(size // 4)
        b = a + 1
        del a
        c = b * 2
        del b, c

    memory = peak_memory(work)
    assert memory.tensors == pytest.approx(2 * size, rel=0.01)
    assert memory.total is None
    assert "torch.profiler" in memory.method
    assert memory.resident >= 0


def test_time_is_attributed_to_operators_and_modules():
    net = nn.Sequential(nn.Linear(64, 512), nn.Sequential(nn.Linear(512, 512), nn.ReLU()))
    x = torch.randn(64, 64)
    operators, modules = where_time_goes(lambda: net(x), dict(net.named_modules()), calls=3, top=4)
    assert "aten::addmm" in [cost.name for cost in operators]
    assert len(operators) <= 4
    seconds = {cost.name: cost.seconds for cost in modules}
    assert seconds[""] > seconds["1"] > seconds["1.0"] > 0  # children included
    assert [cost.seconds for cost in modules] == sorted(seconds.values(), reverse=True)
    assert modules[0].calls == 1
    assert sum(cost.share for cost in operators) <= 1.0 + 1e-6
    assert not net[0]._forward_hooks
    assert not net[0]._forward_pre_hooks


class Expanded(nn.Module):
    """Gives its own parameter, once per row."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x):
        return self.start[:4].expand(len(x), -1, -1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_that_give_their_own_parameters_are_counted_and_stay_trainable(device):
    module = nn.ModuleDict({"start": Expanded(), "map": nn.Linear(3, 5)})
    module.forward = lambda x: module["map"](module["start"](x))
    module.to(device)
    module["map"].bias.requires_grad_(False)
    assert count_macs(module, (torch.zeros(2, 1, device=device),)).total == 2 * 4 * 3 * 5
    assert [p.requires_grad for p in module.parameters()] == [True, True, False]
