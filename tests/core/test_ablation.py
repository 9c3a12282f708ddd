"""One component at a time: what is declared is checked, finished runs are skipped, differences are paired."""

import json
import math

import pytest
from lab import Lab

from core.config import compose, to_dict
from core.errors import ConfigError
from core.output.render import as_dict
from core.tables.ablation import Options, ablate, override

COMPONENTS = """
components:
  depth: {key: model.network.depth, default: 2, alternatives: [1, 3]}
  augmentation: {key: train_dataloader.dataset.augment, default: true, alternatives: [false]}
"""
EFFECT = {(2, True): (0.90, 0.92, 0.91), (1, True): (0.85, 0.86, 0.83), (3, True): (0.91, 0.92, 0.90)}


def score(cfg):
    key = (cfg["model"]["network"]["depth"], cfg["train_dataloader"]["dataset"]["augment"])
    return {"accuracy": EFFECT.get(key, (0.5, 0.5, 0.5))[cfg["seed"]]}


@pytest.fixture
def lab(user, tmp_path, monkeypatch):
    """The tiny experiment, with components."""
    monkeypatch.syspath_prepend(str(user))
    folder = user / "configs" / "experiment" / "mine"
    (folder / "parts.yaml").write_text(
        (folder / "tiny.yaml").read_text().replace("mine/tiny", "mine/parts") + COMPONENTS
    )
    return Lab(user, tmp_path / "runs", score)


def go(lab, *overrides, **options):
    settings = Options("mine/parts", runs_dir=str(lab.runs), config_dir=str(lab.user / "configs"), **options)
    table, failures = ablate(settings, overrides, runner=lab.run, compose=lab.compose)
    return {row.get("value", row.get("change"))["value"]: row for row in as_dict(table)["rows"]}, failures


def test_base_and_every_alternative_with_paired_differences(lab):
    rows, failures = go(lab)
    assert failures == []
    assert len(lab.trained) == 4 * 3
    assert rows[""]["component"]["value"] == "base"
    assert rows[""]["accuracy"] == {"value": pytest.approx(0.91), "spread": pytest.approx(0.01), "count": 3}
    assert "value" in rows[""]["accuracy:difference"]
    assert rows[""]["accuracy:difference"]["value"] is None
    shallow = rows["1"]["accuracy:difference"]  # -0.05, -0.06, -0.08
    assert shallow["value"] == pytest.approx(-0.19 / 3)
    assert shallow["spread"] == pytest.approx(math.sqrt(0.0007 / 3) / math.sqrt(3))
    assert rows["1"]["accuracy:clear"]["value"] == "yes"
    deep = rows["3"]["accuracy:difference"]  # 0.01, 0, -0.01
    assert deep["value"] == pytest.approx(0.0, abs=1e-12)
    assert deep["spread"] == pytest.approx(0.01 / math.sqrt(3))
    assert rows["3"]["accuracy:clear"]["value"] == "no"
    assert rows["false"]["component"]["value"] == "augmentation"


def test_each_run_changes_one_thing(lab):
    go(lab, seeds=1)
    parts = [(c["model"]["network"]["depth"], c["train_dataloader"]["dataset"]["augment"]) for c in lab.trained]
    assert parts == [(2, True), (1, True), (3, True), (2, False)]


def test_table_and_plot_are_kept(lab):
    go(lab)
    folder = lab.runs / "ablations" / "mine" / "parts"
    assert {p.name for p in folder.iterdir()} == {"table.md", "table.csv", "table.json", "accuracy.png"}
    assert json.loads((folder / "table.json").read_text())["rows"][1]["value"]["value"] == "1"
    from matplotlib.image import imread

    assert imread(folder / "accuracy.png").shape[2] in (3, 4)


def test_finished_runs_are_skipped_and_an_interruption_goes_on(lab):
    from core.config.command.signals import Interrupted

    train = lab.run

    def stop(cfg):
        if len(lab.trained) == 5:
            raise Interrupted("stopped")
        return train(cfg)

    lab.run = stop
    with pytest.raises(Interrupted):
        go(lab, seeds=2)
    lab.run = train
    rows, _ = go(lab, seeds=2)
    assert len(lab.trained) == 8
    assert rows["false"]["accuracy"]["count"] == 2
    go(lab, seeds=3)  # a third seed needs its own runs only
    assert [cfg["seed"] for cfg in lab.trained[8:]] == [2, 2, 2, 2]


def test_a_plain_run_of_the_base_counts(lab):
    lab.run(lab.compose(["experiment=mine/parts", f"runs_dir={lab.runs}", "runtime.threads=2"]))
    rows, _ = go(lab, seeds=1, dry_run=True)
    assert (rows["base"]["done"]["value"], rows["base"]["to do"]["value"]) == (1, 0)
    assert (rows["depth = 1"]["done"]["value"], rows["depth = 1"]["to do"]["value"]) == (0, 1)
    assert rows["depth = 1"]["overrides"]["value"] == "model.network.depth=1"
    assert len(lab.trained) == 1


def test_chosen_components_and_overrides_for_all(lab):
    rows, _ = go(lab, "train_cfg.max_epochs=1", components=["augmentation"], seeds=1)
    assert set(rows) == {"", "false"}
    assert {cfg["train_cfg"]["max_epochs"] for cfg in lab.trained} == {1}
    assert rows["false"]["accuracy:difference"] == {"value": pytest.approx(-0.4), "count": 1}
    assert rows["false"]["accuracy:clear"]["value"] is None  # one seed has no error


def test_a_failing_alternative_leaves_its_row_empty(lab):
    lab.fail_on = lambda cfg: cfg["model"]["network"]["depth"] == 3
    rows, failures = go(lab, seeds=2)
    assert failures == ["depth = 3, seed 0: the disc is on fire", "depth = 3, seed 1: the disc is on fire"]
    assert rows["3"]["accuracy"] == {"value": None}
    assert rows["3"]["accuracy:difference"] == {"value": None}
    assert rows["1"]["accuracy"]["count"] == 2


def test_several_metrics_have_to_be_chosen_from_before_time_is_spent(lab):
    lab.score = lambda cfg: {"accuracy": 0.5, "loss": cfg["seed"]}
    with pytest.raises(ConfigError, match=r"several metrics: choose with metric=.*accuracy, loss"):
        go(lab)
    assert len(lab.trained) == 1
    with pytest.raises(ConfigError, match="metric=acuracy: did you mean 'accuracy'"):
        go(lab, metric=["acuracy"])
    rows, _ = go(lab, metric=["loss", "accuracy"], seeds=2)
    assert rows["1"]["loss:difference"]["value"] == 0.0
    assert rows["1"]["accuracy"]["value"] == 0.5


def test_the_selecting_metric_and_its_direction_are_the_default(lab):
    lab.score = lambda cfg: {"accuracy": 0.5, "loss": cfg["seed"]}
    settings = Options("mine/parts", runs_dir=str(lab.runs), config_dir=str(lab.user / "configs"), seeds=1)
    overrides = ["checkpoint.metric=loss", "checkpoint.direction=lower"]
    table, _ = ablate(settings, overrides, runner=lab.run)
    column = next(c for c in as_dict(table)["columns"] if c["key"] == "loss")
    assert column["better"] == "lower"


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("{key: model.network.dept, default: 2, alternatives: [1]}", r"no key 'model\.network\.dept': did you mean"),
        ("{key: model.network.depth, default: 3, alternatives: [1]}", r"default is 3, but model\.network\.depth is 2"),
        ("{key: model.network.depth, default: 2, alternatives: []}", r"alternatives has to be a list of values"),
        ("{key: model.network.depth, default: 2, alternatives: [2]}", r"the alternative 2 is the default itself"),
        ("{key: train_dataloader.dataset.augment, default: 1, alternatives: [0]}", r"default is 1, but .* is true"),
        ("{key: model.network.depth, default: 2}", r"key, default and alternatives"),
    ],
)
def test_declarations_are_held_against_the_config(lab, component, message):
    path = lab.user / "configs" / "experiment" / "mine" / "parts.yaml"
    text = path.read_text().partition("components:")[0]
    path.write_text(f"{text}components:\n  part: {component}\n")
    with pytest.raises(ConfigError, match=rf"components\.part.*{message}"):
        go(lab, dry_run=True)


def test_unknown_components_and_conflicting_overrides_are_named(lab):
    with pytest.raises(ConfigError, match="no component 'augmentaton': did you mean 'augmentation'"):
        go(lab, components=["augmentaton"])
    with pytest.raises(ConfigError, match=r"your override model\.network\.depth=3 changes it"):
        go(lab, "model.network.depth=3")
    rows, _ = go(lab, "model.network.depth=3", components=["augmentation"], dry_run=True)
    assert set(rows) == {"base", "augmentation = false"}
    with pytest.raises(ConfigError, match="declares no components"):
        ablate(Options("mine/tiny", config_dir=str(lab.user / "configs")), [], runner=lab.run)
    with pytest.raises(ConfigError, match="seeds=0"):
        go(lab, seeds=0)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -0.5,
        1e-6,
        "avg",
        "null",
        "true",
        "",
        "it's",
        "a, b: [c] {d} $x",
        "ends with \\",
        "back\\'slash",
        "3",
        [1, "two", None, [False]],
        {"type": "torch.nn.GELU", "approximate": "tanh"},
    ],
)
def test_any_value_travels_through_an_override(user, value):
    """Hydra reads back exactly the value, type included; a mapping replaces the one that was there."""
    overrides = override("model.network", value)
    cfg = compose(["experiment=mine/tiny", *overrides], config_dir=user / "configs")
    got = to_dict(cfg)["model"]["network"]
    assert got == value
    assert type(got) is type(value)
