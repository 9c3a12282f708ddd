"""Schedules: their values, how they sit in optimizers, and resuming."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from core.errors import ConfigError
from core.optim.groups import OptimConstructor
from core.optim.schedules import (
    Schedule,
    constant,
    cosine_ramp,
    exponential,
    linear_ramp,
    multi_step,
    polynomial,
    value,
    warmup_cosine,
)
from core.optim.wrapper import OptimWrapper


def sgd(lr: float = 1.0, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, **options)


def values(schedule: Schedule, optimizer: Any, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return out


# ---------------------------------------------------------------------- golden values of the recipes
def test_timms_cosine_counts_the_warm_up() -> None:
    # Swin / STViT-R: 30 epochs of 10 steps, 2 of them warm-up, batch 1024; timm 1.0 after step_update(i).
    options = {"total": 300, "lr": 1e-3, "warmup": 20, "warmup_lr": 1e-6, "min_lr": 1e-5}
    golden = {0: 1e-6, 1: 5.095e-5, 19: 9.5005e-4, 20: 9.8918306e-4, 21: 9.880788e-4, 299: 1.0027e-5}
    for step, lr in golden.items():
        assert warmup_cosine(step, **options) == pytest.approx(lr, rel=1e-4)
    assert warmup_cosine(300, **options) == 1e-5


def test_it_equals_timms_scheduler() -> None:
    from timm.scheduler import CosineLRScheduler

    for prefix in (False, True):
        optimizer = sgd(0.5)
        cosine_steps = 40 if not prefix else 33  # timm's t_initial leaves a prefixed warm-up out
        theirs = CosineLRScheduler(
            optimizer, t_initial=cosine_steps, lr_min=0.01, warmup_t=7, warmup_lr_init=0.02, warmup_prefix=prefix
        )
        for step in range(40):
            theirs.step(step)
            ours = warmup_cosine(step, total=40, lr=0.5, warmup=7, warmup_lr=0.02, min_lr=0.01, prefix=prefix)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_maes_fractional_epochs() -> None:
    golden = {0.0: 0.0, 0.2: 7.5e-6, 3.8: 1.425e-4, 4.0: 1.5e-4, 4.2: 1.49942178e-4, 4.6: 1.49480134e-4}
    for epoch, lr in golden.items():
        assert warmup_cosine(epoch, total=20, lr=1.5e-4, warmup=4, prefix=True) == pytest.approx(lr, rel=1e-7)


def test_the_slot_encoders_warm_up_multiplies_its_decay() -> None:
    golden = {
        0: 0.0,
        1: 0.0001999972274304958,
        2500: 0.4829681644624228,
        5000: 0.9330329915368074,
        249999: 0.0312504332199907,
    }
    for step, factor in golden.items():
        assert exponential(step, lr=1.0, period=50000, warmup=5000) == pytest.approx(factor, rel=1e-7)


def test_per_epoch_decay_with_a_floor_and_a_warm_up_in_steps() -> None:
    # PTP: 500 steps an epoch here; 3000 warm-up steps at its real size lie within the first epoch
    golden = [3e-4, 2.7e-4, 2.43e-4, 2.187e-4]
    assert [exponential(e, lr=3e-4, period=1, gamma=0.9, min_lr=1e-6) for e in range(4)] == pytest.approx(golden)
    assert exponential(400, lr=3e-4, period=1, gamma=0.9, min_lr=1e-6) == 1e-6
    options = {"lr": 3e-4, "period": 7000, "gamma": 0.9, "staircase": True, "warmup": 3000, "warmup_lr": 1e-6}
    warm = {0: 1e-6, 1: 1.0996666666666666e-06, 1500: 1.505e-4, 2999: 2.999003333e-4, 3050: 3e-4, 7000: 2.7e-4}
    for step, lr in warm.items():
        assert exponential(step, **options) == pytest.approx(lr, rel=1e-8)


def test_detections_steps_after_a_warm_up() -> None:
    options = {"lr": 1e-4, "milestones": [27, 33], "warmup": 0.5, "warmup_lr": 1e-7}
    golden = {0: 1e-7, 0.25: 5.005e-5, 0.5: 1e-4, 26.9: 1e-4, 27: 1e-5, 33: 1e-6, 36: 1e-6}
    for epoch, lr in golden.items():
        assert multi_step(epoch, **options) == pytest.approx(lr)


def test_polynomial_decay_after_a_prefix() -> None:
    options = {"total": 200, "lr": 1e-4, "warmup": 50, "prefix": True}
    golden = {0: 0.0, 25: 5e-5, 50: 1e-4, 125: 5e-5, 200: 0.0, 300: 0.0}
    for step, lr in golden.items():
        assert polynomial(step, **options) == pytest.approx(lr)
    assert polynomial(50, total=100, lr=1.0, power=2.0, min_lr=0.2) == pytest.approx(0.4)


def test_constant_with_and_without_a_warm_up() -> None:
    assert [constant(s, lr=2.0) for s in (0, 10**9)] == [2.0, 2.0]
    assert [constant(s, lr=2.0, warmup=4, warmup_lr=1.0) for s in (0, 2, 4, 5)] == [1.0, 1.5, 2.0, 2.0]


def test_ramps_of_loss_weights() -> None:
    assert [linear_ramp(s, end=1000, first=0, last=0.4) for s in (0, 250, 999, 2000)] == pytest.approx(
        [0, 0.1, 0.3996, 0.4]
    )
    assert [cosine_ramp(s, end=40, first=0.1, last=0.9) for s in (0, 1, 20, 40, 99)] == pytest.approx(
        [0.1, 0.10123307, 0.5, 0.9, 0.9]
    )
    assert cosine_ramp(20000, begin=5000, end=50000, first=1.0, last=0.1) == pytest.approx(0.775)


def test_lag_hold_and_ceiling() -> None:
    assert [value("exponential", s, lr=8.0, period=1, lag=1) for s in range(4)] == [8.0, 8.0, 4.0, 2.0]
    held = [value("exponential", s, lr=8.0, period=1, hold=2, hold_lr=0.5) for s in range(4)]
    assert held == [0.5, 0.5, 2.0, 1.0]
    assert [value("exponential", s, lr=8.0, period=1, ceiling=3.0) for s in range(4)] == [3.0, 3.0, 2.0, 1.0]


# ---------------------------------------------------------------------- in an optimizer
def test_the_first_update_uses_the_warm_ups_first_value() -> None:
    optimizer = sgd(1e-3)
    schedule = Schedule(optimizer, "warmup_cosine", by_epoch=False, warmup="2 epochs", warmup_lr=1e-6, min_lr=1e-5)
    assert optimizer.param_groups[0]["lr"] == 1e-3  # the run's length is not known yet
    schedule.resolve(300, 10)
    assert values(schedule, optimizer, 3) == pytest.approx([1e-6, 5.095e-5, 1.009e-4])


def test_a_lag_of_one_repeats_the_first_value() -> None:
    optimizer = sgd(1e-3)
    schedule = Schedule(
        optimizer, "warmup_cosine", by_epoch=False, warmup=20, warmup_lr=1e-6, min_lr=1e-5, lag=1, total=300
    )
    schedule.resolve(300, 10)
    assert values(schedule, optimizer, 3) == pytest.approx([1e-6, 1e-6, 5.095e-5])


def test_by_epoch_as_the_vtab_recipe_steps() -> None:
    optimizer = sgd(1e-3)
    options = {"warmup": 10, "warmup_lr": 1e-6, "min_lr": 1e-5}
    schedule = Schedule(optimizer, "warmup_cosine", by_epoch=True, lag=1, **options)
    schedule.resolve(100 * 15, 15)
    got = values(schedule, optimizer, 100)
    assert got[0] == got[1] == pytest.approx(1e-6)
    assert got[2] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 10)
    assert got[51] == pytest.approx(warmup_cosine(50, total=100, lr=1e-3, **options))


@pytest.mark.parametrize(
    ("length", "steps"), [(40, 40), (0.1, 40), ("40 steps", 40), ("1 step", 1), ("2 epochs", 40), ("0.5 epochs", 10)]
)
def test_lengths_in_numbers_shares_steps_and_epochs(length: Any, steps: int) -> None:
    optimizer = sgd()
    schedule = Schedule(optimizer, "warmup_cosine", by_epoch=False, warmup=length)
    schedule.resolve(400, 20)
    got = [schedule.at(s) for s in range(60)]
    assert got == pytest.approx([warmup_cosine(s, total=400, lr=1.0, warmup=steps) for s in range(60)])


def test_units_mix_and_a_horizon_may_exceed_the_run() -> None:
    optimizer = sgd()
    schedule = Schedule(optimizer, "multi_step", by_epoch=True, warmup="500 steps", milestones=[27, "33 epochs"])
    schedule.resolve(36 * 1000, 1000)
    assert [schedule.at(e) for e in (0.25, 0.5, 27, 33)] == pytest.approx([0.5, 1.0, 0.1, 0.01])
    horizon = Schedule(optimizer, "warmup_cosine", by_epoch=False, total="300 epochs")
    horizon.resolve(30 * 10, 10)
    assert horizon.at(300) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))


def test_accumulation_leaves_the_schedule_as_with_the_big_batch() -> None:
    model = nn.Linear(2, 1)
    options = {"warmup": 2, "by_epoch": False}

    def used(counts: int, iterations: int, **more: Any) -> list[float]:
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=counts)
        wrapper.initialize_count_status(model, 0, iterations)
        schedule = Schedule(wrapper, "warmup_cosine", **options, **more)
        schedule.resolve(iterations, None)
        lrs = []
        for _ in range(iterations):
            before = wrapper.updates
            lr = wrapper.param_groups[0]["lr"]
            wrapper.update_params(model(torch.ones(1, 2)).sum())
            lrs += [lr] * (wrapper.updates - before)
            schedule.step()
        return lrs

    assert used(3, 17) == pytest.approx(used(1, 6))  # five whole windows and one of two
    in_iterations = used(3, 17, count="iterations")
    assert in_iterations[0] == pytest.approx(warmup_cosine(2, total=17, lr=1.0, warmup=2))


def test_groups_keep_their_ratios_and_tags_choose_groups() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "predictor": nn.Linear(2, 1)})
    config = {
        "optimizer": {"type": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.05},
        "paramwise": {
            "no_decay": True,
            "multipliers": {"backbone": {"lr": 0.25}, "predictor": {"lr": 0.5}},
            "groups": {"predictor": ["predictor"]},
        },
    }
    wrapper = OptimConstructor(config)(model)
    # STPrivacy: predictors follow the cosine; the rest waits two epochs and stays below a tenth
    first = Schedule(wrapper, "warmup_cosine", min_lr=1e-6, groups=["predictor"])
    rest = Schedule(wrapper, "warmup_cosine", min_lr=1e-6, groups=["default"], hold=2, ceiling=1e-4)
    golden = {0: (5e-4, 0.0), 1: (4.99230104e-4, 0.0), 2: (4.96925163e-4, 2.5e-5), 32: (4.81980057e-5, 2.40990028e-5)}
    for schedule in (first, rest):
        schedule.resolve(40, 1)
    for epoch in range(33):
        by_tag = {g["tag"]: g["lr"] for g in wrapper.optimizer.param_groups}
        if epoch in golden:
            assert (by_tag["predictor"], by_tag["default"]) == pytest.approx(golden[epoch], rel=1e-7)
        first.step()
        rest.step()
    with pytest.raises(ConfigError, match="did you mean 'predictor'"):
        Schedule(wrapper, groups=["predictors"])


def test_weight_decay_and_momentum_can_be_scheduled() -> None:
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], lr=1.0, weight_decay=0.04)
    decay = Schedule(optimizer, "warmup_cosine", param_name="weight_decay", by_epoch=False, min_lr=0.4)
    beta = Schedule(optimizer, "polynomial", param_name="momentum", by_epoch=False, min_lr=0.5)
    for schedule in (decay, beta):
        schedule.resolve(10, None)
        for _ in range(5):
            schedule.step()
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.22, 0.0])
    assert [g["betas"] for g in optimizer.param_groups] == [(0.7, 0.999)] * 2
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize("stop", [0, 3, 7, 12])
def test_resume_is_exact_also_after_the_optimizers_groups_were_replaced(stop: int) -> None:
    def make() -> tuple[torch.optim.Optimizer, Schedule]:
        optimizer = sgd(0.3)
        schedule = Schedule(optimizer, "warmup_cosine", by_epoch=False, warmup=0.25, prefix=True)
        schedule.resolve(16, 4)
        return optimizer, schedule

    optimizer, schedule = make()
    straight = values(schedule, optimizer, 16)
    optimizer, schedule = make()
    values(schedule, optimizer, stop)
    saved = optimizer.state_dict(), schedule.state_dict()
    fresh, resumed = make()
    if stop != 7:  # the schedule finds its value without the optimizer's state, too
        fresh.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert saved[1] == {"last_step": stop}
    assert values(resumed, fresh, 16 - stop) == straight[stop:]


def test_mmengine_builds_it_and_tells_the_length() -> None:
    optimizer = sgd()
    arguments = {"optimizer": optimizer, "epoch_length": 5}
    config = {"type": Schedule, "kind": "warmup_cosine", "by_epoch": False, "warmup": 4, "end": 40}
    schedule = PARAM_SCHEDULERS.build(config, default_args=arguments)
    assert isinstance(schedule, Schedule) and not schedule.by_epoch
    want = [warmup_cosine(s, total=40, lr=1.0, warmup=4) for s in range(40)]
    assert values(schedule, optimizer, 40) == pytest.approx(want)

    optimizer = arguments["optimizer"] = sgd(1.5e-4)
    config = {"type": Schedule, "kind": "warmup_cosine", "warmup": 4, "prefix": True, "end": 20}
    config["convert_to_iter_based"] = True
    fractional = PARAM_SCHEDULERS.build(config, default_args=arguments)
    assert not fractional.by_epoch
    want = [warmup_cosine(s / 5, total=20, lr=1.5e-4, warmup=4, prefix=True) for s in range(100)]
    assert values(fractional, optimizer, 100) == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "warmup_cosin"}, "did you mean 'warmup_cosine'"),
        ({"kind": "constant", "min_lr": 1e-5}, "'constant' has no option 'min_lr'"),
        ({"kind": "constant", "total": 5}, "has no option 'total'"),
        ({"kind": "multi_step"}, "needs 'milestones'"),
        ({"count": "steps"}, "neither 'updates' nor"),
        ({"kind": "warmup_cosine", "warmup": 500}, "longer than its total of 400"),
        ({"kind": "warmup_cosine", "warmup": "5 parsecs"}, "'500 steps', '20 epochs'"),
        ({"kind": "warmup_cosine", "warmup": -1}, "negative"),
        ({"kind": "warmup_cosine", "warmup": "2 epochs"}, "the run has none"),
        ({"param_name": "weight_decy"}, "did you mean 'weight_decay'"),
    ],
)
def test_what_cannot_be_meant_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(sgd(), by_epoch=False, **options).resolve(400, None)


def test_stepping_before_the_length_is_known_is_an_error() -> None:
    schedule = Schedule(sgd(), "warmup_cosine", by_epoch=False)
    with pytest.raises(ConfigError, match="length of the run"):
        schedule.step()


def test_milestones_in_epochs_wait_until_the_runner_tells_their_length() -> None:
    optimizer = sgd()
    schedule = Schedule(optimizer, "multi_step", by_epoch=False, milestones=["2 epochs"], warmup=2, end=20)
    schedule.resolve(20, 5)
    assert values(schedule, optimizer, 12) == pytest.approx([0.0, 0.5, *[1.0] * 8, 0.1, 0.1])
