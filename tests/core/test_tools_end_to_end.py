"""The real engine behind tables and ablations: trained once, found again, resumed where it stopped."""

import json

import pytest
from tiny_experiment import train

from core.config import compose
from core.engine.launch import build_trainer, run
from core.output.render import as_dict
from core.tables.ablation import Options as AblationOptions
from core.tables.ablation import ablate
from core.tables.runs import launcher
from core.tables.table import Options, show_table

TABLE = """
title: Points
columns:
  accuracy: {better: higher}
  seen: {}
rows:
  - {label: base, experiment: mine/tiny}
"""


@pytest.fixture
def place(user, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine" / "tables" / "points.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(TABLE)
    return path


@pytest.mark.long
def test_a_table_trains_a_row_with_the_engine_and_finds_it_again(user, place, tmp_path, capsys):
    def table(**options):
        return show_table(
            place,
            Options(runs_dir=str(tmp_path / "runs"), **options),
            ["runtime=cpu", "train_cfg.max_epochs=1"],
            compose=lambda overrides: compose(overrides, config_dir=user / "configs"),
            runner=launcher(run),
            build=build_trainer,
        )[0]

    first = as_dict(table(run=True))["rows"][0]
    assert first["seen:ours"] == {"value": 21.0, "count": 1}
    results = list((tmp_path / "runs").rglob("result.json"))
    assert len(results) == 1
    assert json.loads(results[0].read_text())["metrics"]["accuracy"] == first["accuracy:ours"]["value"]
    assert as_dict(table(run=True))["rows"][0] == first
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 1
    assert capsys.readouterr().out == ""  # the engine's lines go to standard error


@pytest.mark.child
def test_a_run_of_tools_train_is_part_of_an_ablation(user, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    folder = user / "configs" / "experiment" / "mine"
    text = (folder / "tiny.yaml").read_text().replace("mine/tiny", "mine/switch")
    part = "components:\n  depth: {key: model.network.depth, default: 2, alternatives: [1]}\n"
    (folder / "switch.yaml").write_text(text + part)
    runs = tmp_path / "runs"
    train(user, "experiment=mine/switch", "train_cfg.max_epochs=1", f"runs_dir={runs}")
    settings = {"seeds": 1, "runs_dir": str(runs), "config_dir": str(user / "configs"), "metric": ["seen"]}
    options = AblationOptions("mine/switch", **settings)
    overrides = ["train_cfg.max_epochs=1", "runtime=cpu"]
    plan, _ = ablate(AblationOptions("mine/switch", dry_run=True, **settings), overrides)
    assert [row["done"]["value"] for row in as_dict(plan)["rows"]] == [1, 0]
    table, failures = ablate(options, overrides)
    assert failures == []
    assert as_dict(table)["rows"][1]["seen:difference"] == {"value": 0.0, "count": 1}
    assert as_dict(table)["rows"][1]["parameters"]["value"] == 818 - (32 + 256 + 16)
    assert len([p for p in runs.rglob("result.json") if "ablations" not in p.parts]) == 2
