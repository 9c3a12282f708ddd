"""Every experiment: composes, resolves, builds without memory, opens with what it is for."""

import pytest

from core.config import CONFIGS, experiments, get, to_dict
from core.config.registry import check
from core.engine.launch import build_trainer
from tests.composed import composed

NAMES = sorted(experiments())


def test_there_are_experiments():
    assert "stvit/digits" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_experiment_opens_with_purpose_figure_cost_and_command(name):
    head = []
    for line in (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    text = "\n".join(head)
    assert experiments()[name], "the first comment line says what it is for"
    assert f"tools/train.py experiment={name}" in text, "the command"
    assert len(head) >= 4, "what it reproduces, the expected figure, what it costs"


@pytest.mark.parametrize("name", NAMES)
def test_experiment_names_things_that_exist(name):
    cfg = to_dict(composed(f"experiment={name}"))
    assert cfg["name"] == name
    check({k: v for k, v in cfg.items() if k not in ("stages", "components")})
    for component in cfg["components"].values():
        value = get(cfg, component["key"])
        assert value == component["default"]
        assert component["alternatives"] and component["default"] not in component["alternatives"]


@pytest.mark.parametrize("name", NAMES)
def test_experiment_builds_without_memory(name):
    trainer = build_trainer(composed(f"experiment={name}"), device="meta")
    tensors = [*trainer.parameters(), *trainer.buffers()]  # clusters of fixed filters have no parameters
    assert sum(t.numel() for t in tensors) > 0
    assert all(t.device.type == "meta" for t in tensors)
