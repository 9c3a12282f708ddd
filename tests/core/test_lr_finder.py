"""A learning rate from one sweep: it follows the rates that were asked for, and leaves no weights."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_schedules_named import DUEL
from tiny_experiment import ROOT

from core.engine.commands.lr_curve import judge
from core.engine.commands.lr_finder import Options, find_lr
from core.engine.hooks.lr_sweep import LRSweep
from core.errors import ConfigError
from core.optim.wrapper import OptimWrapper, OptimWrapperDict


def rates(low, high, count):
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def options(**given):
    return Options(**{"experiment": "mine/tiny", "min": 1e-4, "max": 1.0, "steps": 30, **given})


@pytest.fixture
def sweep(tiny_config, tmp_path):
    """A sweep of the tiny experiment with overrides."""

    def call(*words, folder="sweep", **given):
        return find_lr(tiny_config("param_scheduler=null", *words), options(**given), tmp_path / folder)

    return call


# ---------------------------------------------------------------------- what a curve suggests
def test_the_suggestion_lies_where_the_loss_falls_steepest():
    swept = rates(1e-6, 10.0, 200)
    losses = [2.0 - 1.5 / (1 + math.exp(-4 * math.log10(r / 1e-3))) + (30 * r if r > 0.1 else 0) for r in swept]
    found = judge(swept, losses)
    assert 1e-3 < found.suggestion < 4e-3  # smoothing looks back
    assert found.suggestion < found.lowest < 0.3


def test_a_recovery_behind_the_lowest_point_is_no_suggestion():
    swept = rates(1e-6, 1.0, 100)
    losses = [2.0 - 0.01 * i for i in range(60)] + [3.0] * 20 + [0.0] * 3 + [6.0] * 17
    assert judge(swept, losses).suggestion < swept[60]


def test_a_loss_that_never_falls_suggests_nothing():
    assert judge(rates(1e-6, 1.0, 50), [1.0 + 0.1 * i for i in range(50)]).suggestion is None
    assert judge(rates(1e-6, 1.0, 5), [1.0] * 5).suggestion is None


# ---------------------------------------------------------------------- the sweep
def test_a_sweep_takes_every_rate_once_and_repeats(sweep, tmp_path):
    found = sweep()
    assert found.rates == pytest.approx(rates(1e-4, 1.0, 30)) and len(found.losses) == 30
    assert found.suggestion is not None and 1e-3 < found.suggestion < 1.0 and found.diverged is None
    assert sweep(folder="again") == found
    left = {path.name for path in (tmp_path / "sweep").rglob("*")}
    assert left == {"run.log"}, "neither weights nor results stay"


def test_windows_of_accumulation_have_one_rate_and_one_loss(sweep):
    big = sweep("train_dataloader.batch_size=8")
    small = sweep("optim_wrapper.accumulative_counts=2", folder="small")
    assert small.rates == big.rates
    assert small.losses[:10] == pytest.approx(big.losses[:10], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_sweeps(sweep, precision):
    found = sweep(f"runtime.precision={precision}")
    assert len(found.losses) == 30 and all(math.isfinite(loss) for loss in found.losses)


def test_a_loss_that_runs_away_ends_the_sweep(sweep, tmp_path):
    found = sweep(
        "~optim_wrapper.optimizer", "+optim_wrapper.optimizer={type: torch.optim.SGD, lr: 1}", max=1e9, steps=60
    )
    assert found.diverged is not None and found.diverged < 1e9 and len(found.rates) < 60
    assert not list((tmp_path / "sweep").rglob("*.pt"))


def test_a_loss_that_is_not_finite_ends_the_sweep_without_an_error(sweep, tmp_path):
    sgd = "+optim_wrapper.optimizer={type: torch.optim.SGD, lr: 1}"
    found = sweep("~optim_wrapper.optimizer", sgd, min=1.0, max=1e38, steps=12)
    assert found.diverged is not None and len(found.rates) < 12
    assert not list((tmp_path / "sweep").rglob("*.pt"))


def test_groups_keep_their_factors_and_other_optimizers_their_rates():
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [{"params": [one], "lr": 9.0, "lr_scale": 0.5}, {"params": [two], "lr": 9.0}]
    generator = OptimWrapper(torch.optim.SGD(groups, lr=9.0))
    critic = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=7.0))
    hook = LRSweep(1e-3, 1.0, 4, part="generator")
    runner = SimpleNamespace(optim_wrapper=OptimWrapperDict(generator=generator, critic=critic))
    hook.before_train(runner)
    hook.rates = [1e-3]
    hook.before_train_iter(runner, 0)
    assert [group["lr"] for group in generator.optimizer.param_groups] == pytest.approx([0.005, 0.01])
    assert critic.optimizer.param_groups[0]["lr"] == 7.0


def test_one_of_two_optimizers_is_swept_by_its_own_loss(sweep):
    found = sweep(*[word for word in DUEL if "param_scheduler" not in word], part="discriminator", loss="loss_d")
    assert len(found.rates) == 30 and found.losses[-1] < found.losses[0]


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        ((), {"min": 1.0, "max": 0.1}, r"0 < min < max"),
        ((), {"steps": 5}, r"steps=5"),
        ((), {"part": "generator"}, r"part=generator: the experiment has one optimizer"),
        (DUEL[:-3], {}, r"part=None; choose one of the optimizers: generator, discriminator"),
        (DUEL[:-3], {"part": "generater"}, r"did you mean 'generator'"),
        ((), {"loss": "loss_cee"}, r"loss=loss_cee: did you mean 'loss_ce'"),
        (("train_dataloader=null",), {}, r"nothing is trained"),
    ],
)
def test_what_cannot_be_swept(sweep, words, given, message):
    with pytest.raises(ConfigError, match=message):
        sweep(*words, **given)


def test_the_tool_writes_a_picture_and_the_figures(user, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("find_lr_tool", ROOT / "tools" / "find_lr.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(
        ["experiment=mine/tiny", f"config_dir={user / 'configs'}", "min=1e-4", "steps=30", "runtime=cpu"], tool.__doc__
    )
    said = capsys.readouterr().out
    (record,) = Path("runs/lr/mine/tiny").glob("*/lr.json")
    found = json.loads(record.read_text())
    assert f"suggestion: {found['suggestion']:.3g}" in said and str(record) in said
    assert found["experiment"] == "mine/tiny" and len(found["smoothed"]) == 30
    from PIL import Image

    with Image.open(record.with_name("lr.png")) as image:
        assert image.size[0] > 400
    assert not Path("runs/mine").exists()  # no run of the experiment
