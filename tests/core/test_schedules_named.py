"""Schedules by name of the optimizers that they drive, where there are several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.errors import ConfigError

DUEL = (
    "~model",
    "+model={type: mypoints.Duel, generator: {type: torch.nn.Linear, in_features: 8, out_features: 8},"
    " discriminator: {type: torch.nn.Linear, in_features: 8, out_features: 1}}",
    "~optim_wrapper",
    "+optim_wrapper={generator: {optimizer: {type: torch.optim.SGD, lr: 0.1}},"
    " discriminator: {optimizer: {type: torch.optim.SGD, lr: 0.2}}}",
    "~param_scheduler",
    "train_cfg.max_epochs=1",
    "log_every=1",
)
DECAY = "{type: core.Schedule, kind: warmup_cosine, by_epoch: false}"


def test_an_optimizer_without_a_schedule_keeps_its_rate(tiny):
    result = tiny(*DUEL, f"+param_scheduler={{generator: {DECAY}}}")
    lines = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
    rates = [(line["lr_generator"], line["lr_discriminator"]) for line in lines if "lr_generator" in line]
    assert len(rates) == 10 and rates[-1][0] < 0.01 < rates[0][0]
    assert {rate for _, rate in rates} == {0.2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*DUEL, f"+param_scheduler={{generater: {DECAY}}}"), r"param_scheduler\.generater.*did you mean 'generator'"),
        (
            ("~param_scheduler", f"+param_scheduler={{network: {DECAY}}}"),
            r"param_scheduler\.network: there is one opti",
        ),
    ],
)
def test_schedules_of_optimizers_that_do_not_exist(tiny, words, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*words)
