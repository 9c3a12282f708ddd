"""A paper's table: the file is checked word by word, figures find their cells, and what is unknown stays empty."""

import json
import shutil

import pytest
import yaml
from lab import Lab

from core.config.fingerprint import fingerprint, first_difference
from core.engine.launch import build_trainer
from core.errors import ConfigError
from core.output.render import as_dict, render
from core.profile import figures as figures_module
from core.profile.figures import Figures
from core.tables.runs import Results
from core.tables.table import Evaluation, Options, find_tables, list_tables, show_table, side_by_side
from core.tables.table_file import load_table

TABLE = """
title: Points
source: paper, Table 3
columns:
  parameters: {label: params, unit: K, needs: none, digits: 3}
  macs: {unit: K, needs: none, better: lower, digits: 3}
  less: {label: MACs, unit: "%", needs: none, of: macs, relation: change, digits: 1}
  accuracy: {label: Top-1, unit: "%", better: higher, scale: 100, digits: 1}
  gain: {of: accuracy, scale: 100, relation: difference, digits: 1}
rows:
  - {label: base, experiment: mine/tiny, paper: {accuracy: 79.8, parameters: {value: 0.8, mark: derived}}}
  - label: deep
    experiment: mine/tiny
    overrides: [model.network.depth=4]
    relative_to: base
    paper: {accuracy: {value: "> 80", mark: [note, uncertain], text: page 3}, gain: {value: 1.5, mark: cited}}
    section: ours
  - {label: peer, paper: {accuracy: 70.1}}
notes: [a note]
"""


def score(cfg):
    """Accuracy .80 + seed/100, and .10 more with depth 4."""
    return {"accuracy": 0.80 + cfg["seed"] / 100 + (0.10 if cfg["model"]["network"]["depth"] == 4 else 0.0), "seen": 21}


@pytest.fixture
def lab(user, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    return Lab(user, tmp_path / "runs", score)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mine" / "tables" / "points.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(TABLE)
    return path


def shown(path, lab, overrides=(), **options):
    """The table as the tool makes it: {(row, column): cell}, and its notes."""
    settings = Options(runs_dir=str(lab.runs), **options)
    table, _ = show_table(path, settings, overrides, compose=lab.compose, runner=lab.run, build=build_trainer)
    data = as_dict(table)
    cells = {
        (row["label"]["value"], key): cell for row in data["rows"] for key, cell in row.items() if key != "section"
    }
    return cells, data["notes"]


# --- cells ----------------------------------------------------------------------------------------------------------


def test_data_free_figures_need_no_run(path, lab):
    """Hand count: stem 8->16, depth blocks LN + 16->16, LN, head 16->2."""
    cells, _ = shown(path, lab)
    block = 32 + 16 * 16 + 16
    parameters = {2: 8 * 16 + 16 + 2 * block + 32 + 34, 4: 8 * 16 + 16 + 4 * block + 32 + 34}
    macs = {2: 8 * 16 + 2 * 256 + 32, 4: 8 * 16 + 4 * 256 + 32}
    assert cells["base", "parameters:ours"]["value"] == pytest.approx(parameters[2] / 1e3)
    assert cells["deep", "parameters:ours"]["value"] == pytest.approx(parameters[4] / 1e3)
    assert cells["deep", "macs:ours"]["value"] == pytest.approx(macs[4] / 1e3)
    assert cells["deep", "less:ours"]["value"] == pytest.approx(100 * (macs[4] / macs[2] - 1))


def test_unknown_cells_stay_empty(path, lab):
    cells, _ = shown(path, lab)
    empty = {key for key, cell in cells.items() if cell["value"] is None}
    assert ("deep", "accuracy:ours") in empty  # nothing was trained
    assert ("base", "less:ours") in empty  # the base is relative to nothing
    assert {("peer", f"{c}:ours") for c in ("parameters", "macs", "less", "accuracy", "gain")} <= empty
    assert ("deep", "parameters:paper") in empty
    assert not any(key == "macs:paper" for _, key in cells)  # the paper says nothing in that column
    assert lab.trained == []


def test_paper_figures_carry_their_origin(path, lab):
    cells, notes = shown(path, lab)
    assert cells["base", "accuracy:paper"] == {"value": 79.8}
    assert cells["base", "parameters:paper"] == {"value": 0.8, "mark": "arithmetic on other figures"}
    mark = "read in a third party's note on the paper, uncertain: page 3"
    assert cells["deep", "accuracy:paper"] == {"value": "> 80", "mark": mark}
    assert notes == ["Paper: paper, Table 3.", "a note"]


def test_runs_fill_cells_with_mean_deviation_and_count(path, lab):
    for seed in range(3):
        lab.run(lab.compose(["experiment=mine/tiny", f"seed={seed}", f"runs_dir={lab.runs}"]))
    lab.run(lab.compose(["experiment=mine/tiny", "model.network.depth=4", "seed=1", f"runs_dir={lab.runs}"]))
    cells, notes = shown(path, lab)
    base = cells["base", "accuracy:ours"]
    assert base["value"] == pytest.approx(81.0)
    assert base["spread"] == pytest.approx(1.0)  # of 80, 81, 82
    assert base["count"] == 3
    assert cells["deep", "accuracy:ours"] == {"value": pytest.approx(91.0), "count": 1}
    assert cells["deep", "gain:ours"]["value"] == pytest.approx(10.0)  # the seed that both have
    assert cells["peer", "accuracy:ours"] == {"value": None}
    assert any("standard deviation" in note for note in notes)
    cells, _ = shown(path, lab, seeds=2)
    assert cells["base", "accuracy:ours"]["count"] == 2


def test_run_trains_what_is_missing_and_nothing_twice(path, lab):
    lab.run(lab.compose(["experiment=mine/tiny", "seed=0", f"runs_dir={lab.runs}"]))
    cells, _ = shown(path, lab, run=True, seeds=2)
    assert [(c["model"]["network"]["depth"], c["seed"]) for c in lab.trained] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert cells["deep", "gain:ours"] == {"value": pytest.approx(10.0), "spread": pytest.approx(0.0), "count": 2}
    shown(path, lab, run=True, seeds=2)
    assert len(lab.trained) == 4


def test_only_one_row_is_trained_on_request(path, lab):
    shown(path, lab, run=True, only="deep")
    assert [(c["model"]["network"]["depth"], c["seed"]) for c in lab.trained] == [(4, 0)]
    with pytest.raises(ConfigError, match="did you mean 'deep'"):
        shown(path, lab, run=True, only="depp")


def test_a_failing_row_is_reported_and_the_others_go_on(path, lab):
    lab.fail_on = lambda cfg: cfg["model"]["network"]["depth"] == 2
    cells, notes = shown(path, lab, run=True)
    assert cells["base", "accuracy:ours"] == {"value": None}
    assert cells["deep", "accuracy:ours"]["value"] == pytest.approx(90.0)
    assert "base, seed 0: not trained: the disc is on fire" in notes


def test_a_metric_that_runs_do_not_have_is_named(path, lab):
    path.write_text(TABLE.replace("accuracy: {label: Top-1", "top1: {label: Top-1").replace("accuracy: 7", "top1: 7"))
    path.write_text(path.read_text().replace("paper: {accuracy: {", "paper: {top1: {"))
    lab.run(lab.compose(["experiment=mine/tiny", f"runs_dir={lab.runs}"]))
    cells, notes = shown(path, lab)
    assert cells["base", "top1:ours"] == {"value": None}
    assert "base: its runs have no metric 'top1' (they have accuracy, seen)." in notes


def test_means_over_columns_and_per_column_overrides(path, lab):
    """One data set per column (here: a depth), and their mean; the paper's mean is derived where it gives none."""
    path.write_text(
        """
title: Tasks
columns:
  easy: {of: accuracy}
  hard: {of: accuracy, overrides: [model.network.depth=4]}
  mean: {mean_of: [easy, hard], digits: 3}
rows:
  - {label: ours, experiment: mine/tiny, paper: {easy: 0.5, hard: 0.7}}
  - {label: peer, paper: {easy: 0.5}}
"""
    )
    cells, _ = shown(path, lab)
    assert cells["ours", "mean:ours"] == {"value": None}
    cells, _ = shown(path, lab, run=True, seeds=2)
    assert cells["ours", "easy:ours"]["value"] == pytest.approx(0.805)
    assert cells["ours", "hard:ours"]["value"] == pytest.approx(0.905)
    assert cells["ours", "mean:ours"]["value"] == pytest.approx(0.855)
    assert cells["ours", "mean:paper"] == {
        "value": pytest.approx(0.6),
        "mark": "mean of the paper's figures, derived here",
    }
    assert cells["peer", "mean:paper"] == {"value": None}


def test_a_cell_may_have_an_experiment_of_its_own(path, lab):
    path.write_text(
        """
title: Cells
columns:
  one: {of: accuracy}
  two: {of: accuracy}
rows:
  - label: r
    experiment: mine/tiny
    cells: {two: {experiment: mine/tiny, overrides: [model.network.depth=4]}}
"""
    )
    cells, _ = shown(path, lab, run=True)
    assert (cells["r", "one:ours"]["value"], cells["r", "two:ours"]["value"]) == (
        pytest.approx(0.8),
        pytest.approx(0.9),
    )


def test_a_trainer_adds_its_own_figures(path, lab, monkeypatch):
    import mypoints

    def table_figures(self, cfg):
        return {"tokens": len(self.network.blocks), "kind": cfg["name"]}

    monkeypatch.setattr(mypoints.Classify, "table_figures", table_figures, raising=False)
    path.write_text(
        "title: T\ncolumns: {tokens: {needs: none}, kind: {needs: none}}\nrows: [{label: r, experiment: mine/tiny}]\n"
    )
    cells, _ = shown(path, lab)
    assert (cells["r", "tokens:ours"]["value"], cells["r", "kind:ours"]["value"]) == (2, "mine/tiny")
    path.write_text("title: T\ncolumns: {tokenz: {needs: none}}\nrows: [{label: r, experiment: mine/tiny}]\n")
    with pytest.raises(ConfigError, match=r"row 'r', column 'tokenz': no figure 'tokenz'.*did you mean 'tokens'"):
        shown(path, lab)


def test_costs_of_a_part(path, lab):
    path.write_text(
        """
title: T
columns:
  stem: {needs: none, of: macs/stem}
  macs: {needs: none}
  head: {needs: none, of: macs/head}
rows: [{label: r, experiment: mine/tiny}]
"""
    )
    cells, _ = shown(path, lab)
    costs = [cells["r", f"{key}:ours"]["value"] for key in ("stem", "macs", "head")]
    assert costs == [8 * 16, 8 * 16 + 2 * 16 * 16 + 16 * 2, 16 * 2]
    path.write_text("title: T\ncolumns: {macs/neck: {needs: none}}\nrows: [{label: r, experiment: mine/tiny}]\n")
    with pytest.raises(ConfigError, match=r"no figure 'macs/neck'.*there are: .*macs, macs/head, macs/stem"):
        shown(path, lab)


def test_every_config_is_built_once(path, lab):
    built = []

    def build(cfg, device):
        built.append(device)
        return build_trainer(cfg, device)

    settings = Options(runs_dir=str(lab.runs))
    show_table(path, settings, [], compose=lab.compose, runner=lab.run, build=build)
    assert built == ["meta", "meta"]


def test_measured_columns_are_measured_on_request(path, lab):
    path.write_text(
        """
title: Speed
columns:
  throughput: {unit: samples/s, needs: gpu, better: higher}
  faster: {of: throughput, needs: gpu, relation: ratio, relative_to: small}
rows:
  - {label: small, experiment: mine/tiny, overrides: [model.network.depth=1]}
  - {label: large, experiment: mine/tiny, overrides: [model.network.depth=40]}
profile: {batch: 4, repeats: 3, threads: 1, device: cpu}
"""
    )
    cells, _ = shown(path, lab)
    assert {cell["value"] for (_, key), cell in cells.items() if key != "label"} == {None}
    cells, _ = shown(path, lab, measure=True)
    assert cells["small", "throughput:ours"]["value"] > cells["large", "throughput:ours"]["value"] > 0
    assert cells["large", "faster:ours"]["value"] < 0.8
    assert set(figures_module.MEASURED) >= {"throughput", "latency"}


SPEED = """
title: Speed
columns:
  throughput: {unit: samples/s, needs: gpu, better: higher}
  faster: {of: throughput, needs: gpu, relation: ratio, relative_to: small}
  accuracy: {}
rows:
  - {label: small, experiment: mine/tiny, overrides: [model.network.depth=1]}
  - {label: large, experiment: mine/tiny, overrides: [model.network.depth=40]}
profile: {batch: 4, repeats: 3, threads: 1, device: cpu}
"""


def test_stored_runs_and_rounds_fill_cells_without_a_runs_folder(path, lab, tmp_path):
    path.write_text(SPEED)
    made, _ = shown(path, lab, run=True, seeds=2, measure=True, store=True)
    kept = json.loads((tmp_path / "results" / "tables" / "mine_points.json").read_text())
    assert kept["command"] == "python tools/table.py mine/points run=true seeds=2 measure=true store=true"
    assert [(run["seed"], run["metrics"]["accuracy"]) for run in kept["runs"]] == [(0, 0.8), (1, 0.81)] * 2
    assert all(len(row["rounds"]) == 3 for row in kept["measured"]["throughput"]["rows"].values())
    assert str(tmp_path) not in json.dumps(kept)
    shutil.rmtree(lab.runs)  # as on another machine
    again, notes = shown(path, lab)
    assert again == made
    assert again["small", "accuracy:ours"]["count"] == 2 and again["large", "faster:ours"]["value"] < 0.8
    assert any("Stored runs of commit c0ffee" in note for note in notes)
    assert any("throughput: stored, measured in turn on" in note for note in notes)
    assert len(lab.trained) == 4
    shown(path, lab, run=True, seeds=3)
    assert [cfg["seed"] for cfg in lab.trained[4:]] == [2, 2], "what is stored is not trained again"
    shutil.rmtree(lab.runs)
    assert not any(cell["value"] for (_, key), cell in shown(path, lab, fresh=True)[0].items() if key != "label")


def test_a_stored_result_of_another_config_fills_nothing(path, lab):
    path.write_text(SPEED)
    shown(path, lab, run=True, seeds=1, measure=True, store=True)
    shutil.rmtree(lab.runs)
    path.write_text(SPEED.replace("depth=40", "depth=41"))
    cells, _ = shown(path, lab)
    assert cells["small", "accuracy:ours"]["value"] and cells["small", "throughput:ours"]["value"]
    assert {cells["large", f"{key}:ours"]["value"] for key in ("throughput", "faster", "accuracy")} == {None}


def test_a_table_shows_what_another_table_or_a_claim_of_its_paper_has_stored(path, lab, tmp_path):
    other = path.with_name("other.yaml")
    other.write_text(TABLE)
    shown(other, lab, run=True, store=True)
    shutil.rmtree(lab.runs)
    cells, _ = shown(path, lab)
    assert cells["deep", "accuracy:ours"] == {"value": pytest.approx(90.0), "count": 1}
    claims, tables = tmp_path / "results" / "claims", tmp_path / "results" / "tables"
    claims.mkdir()
    runs = json.loads((tables / "mine_other.json").read_text())["runs"]
    shutil.rmtree(tables)
    path.with_name("claim.yaml").write_text("")
    record = {"definition_hash": "", "row_configs": {}, "figures": {}, "rows": [{"label": "a", "runs": runs}]}
    (claims / "mine.json").write_text(json.dumps(record))
    assert shown(path, lab)[0] == cells
    (claims / "mine.json").write_text("{")
    with pytest.raises(ConfigError, match=r"mine\.json is damaged"):
        shown(path, lab)


@pytest.mark.parametrize("content", ["{", "{}", '{"runs": [{}], "measured": {}}', '{"runs": [], "measured": {"a": 1}}'])
def test_a_damaged_store_is_named(path, lab, tmp_path, content):
    file = tmp_path / "results" / "tables" / "mine_points.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"mine_points\.json is damaged"):
        shown(path, lab)


def test_a_ratio_of_measured_rows_is_that_of_their_rounds(path, lab, monkeypatch):
    """The machine halves its speed after the first round: the ratio of medians would be 4 for 2."""
    path.write_text(SPEED)
    rounds = {"small": (8.0, 4.0, 4.0), "large": (16.0, 16.0, 8.0)}
    measured = {"throughput": {label: figures_module.Measured.of(values) for label, values in rounds.items()}}
    evaluation = Evaluation(
        load_table(path),
        compose=lab.compose,
        figures=Figures(build_trainer),
        results=Results(lab.runs, lab.compose),
        measured=measured,
    )
    cells = as_dict(side_by_side(evaluation))["rows"][1]
    assert cells["throughput:ours"]["value"] == 16.0 and cells["faster:ours"]["value"] == 2.0


def test_show_keeps_one_side(path, lab):
    cells, _ = shown(path, lab, show="paper")
    assert not [key for _, key in cells if key.endswith(":ours")]
    cells, _ = shown(path, lab, show="ours")
    assert not [key for _, key in cells if key.endswith(":paper")]


def test_renders_in_every_format(path, lab):
    spec = load_table(path)
    table = side_by_side(
        Evaluation(spec, compose=lab.compose, figures=Figures(build_trainer), results=Results(lab.runs, lab.compose))
    )
    text = render(table, "text")
    assert "> 80ᵇ" in text
    assert "ᵇ read in a third party's note on the paper, uncertain: page 3" in text
    for format in ("md", "csv", "json"):
        assert "arithmetic on other figures" in render(table, format)


# --- which runs count -----------------------------------------------------------------------------------------------


def finished(lab, *overrides):
    return lab.run(lab.compose(["experiment=mine/tiny", f"runs_dir={lab.runs}", *overrides]))


def found(lab, *overrides):
    return Results(lab.runs, lab.compose).match(lab.compose(["experiment=mine/tiny", *overrides]))


def test_place_and_machine_do_not_matter(lab):
    finished(lab, "runtime.threads=3", "train_dataloader.num_workers=2", "log_every=7", "checkpoint.keep_last=5")
    assert found(lab) is not None
    assert found(lab, "model.network.depth=2") is not None  # the default, said aloud
    assert found(lab, "+train_dataloader.dataset.root=/mnt/points") is not None
    assert found(lab, "load_from=weights.pth") is None
    assert found(lab, "seed=1") is None
    assert found(lab, "model.network.depth=3") is None
    assert found(lab, "runtime.precision=bf16") is None
    assert found(lab, "train_cfg.max_epochs=4") is None


def test_of_an_absolute_path_only_the_last_part_counts(lab):
    finished(lab, "load_from=/home/me/weights.pth")
    assert found(lab, "load_from=/cluster/weights.pth") is not None
    assert found(lab, "load_from=/cluster/others.pth") is None


def test_a_result_copied_from_elsewhere_counts_without_its_config(lab, tmp_path):
    finished(lab, "model.network.depth=4", "seed=5")
    source = next(lab.runs.rglob("result.json"))
    copy = lab.runs / "from_cluster" / "x"
    copy.mkdir(parents=True)
    shutil.copy(source, copy / "result.json")
    shutil.rmtree(source.parent)
    assert found(lab, "model.network.depth=4", "seed=5").path == copy / "result.json"
    assert found(lab, "seed=5") is None


def test_runs_of_an_earlier_config_do_not_count_and_say_why(path, lab):
    finished(lab)
    config = next(lab.runs.rglob("config.yaml"))
    stored = yaml.safe_load(config.read_text())
    stored["model"]["network"]["width"] = 99
    config.write_text(yaml.safe_dump(stored))
    cells, notes = shown(path, lab)
    assert cells["base", "accuracy:ours"] == {"value": None}
    reason = "a finished run of an earlier config does not count (model.network.width: 99 there, 16 here)."
    assert f"base, seed 0: {reason}" in notes


def test_unfinished_stages_and_broken_results_do_not_count(lab, capsys):
    finished(lab)
    path = next(lab.runs.rglob("result.json"))
    data = json.loads(path.read_text())
    stage = path.parent / "stage_0_first"
    stage.mkdir()
    path.rename(stage / "result.json")
    assert found(lab) is None
    path.write_text(json.dumps({**data, "status": "running"}))
    assert found(lab) is None
    path.write_text('{"name": "mine/ti')
    assert found(lab) is None
    assert "cannot be read" in capsys.readouterr().err


def test_the_newest_of_two_equal_runs_counts(lab):
    finished(lab)
    lab.score = lambda cfg: {"accuracy": 0.99}
    finished(lab)
    assert found(lab).metrics == {"accuracy": 0.99}


def test_fingerprints_ignore_order_but_not_values(lab):
    one = lab.compose(["experiment=mine/tiny", "model.network.depth=4", "train_cfg.max_epochs=4"])
    same = lab.compose(["experiment=mine/tiny", "train_cfg.max_epochs=4", "model.network.depth=4"])
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(lab.compose(["experiment=mine/tiny", "model.network.depth=4"]))
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a.1.b: 2 there, 3 here"
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == "c is only here"


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Points", "titel: Points", r"unknown key 'titel': did you mean 'title'"),
        ("title: Points\n", "", r"'title' is missing"),
        ("better: lower", "beter: lower", r"columns\.macs: unknown key 'beter': did you mean 'better'"),
        ("better: lower", "better: low", r"columns\.macs\.better: 'low': did you mean 'lower'"),
        ("digits: 1}\n  gain", "digits: one}\n  gain", r"columns\.accuracy\.digits: a whole number"),
        ("scale: 100, digits", "scale: big, digits", r"columns\.accuracy\.scale: a number"),
        ("paper: {accuracy: 79.8", "paper: {acuracy: 79.8", r"rows\[0\] \(base\)\.paper: no column 'acuracy': did you"),
        ("mark: cited", "mark: sited", r"rows\[1\] \(deep\)\.paper\.gain\.mark: 'sited': did you mean 'cited'"),
        ("value: 1.5", "value: [1.5]", r"paper\.gain\.value: a number or the paper's own words"),
        ("{accuracy: 70.1}", "[70.1]", r"rows\[2\] \(peer\)\.paper: a mapping"),
        ("relative_to: base", "relative_to: bass", r"rows\[1\] \(deep\)\.relative_to: no row 'bass': did you mean"),
        ("    relative_to: base\n", "", r"columns\.less: relation: change to what"),
        ("label: peer", "label: base", r"rows\[2\] \(base\): an earlier row has this label"),
        ("[model.network.depth=4]", "[model.network.depth]", r"overrides\[0\]: 'model\.network\.depth' is no override"),
        ("[model.network.depth=4]", "depth=4", r"overrides: a list is needed"),
        ("{label: peer,", "{label: peer, overrides: [a=1],", r"overrides without an experiment"),
        (
            "notes: [a note]",
            "notes: [a note]\nprofile: {bach: 3}",
            r"profile: unknown key 'bach': did you mean 'batch'",
        ),
        ("notes: [a note]", "title: again", r"(?s)cannot be read.*duplicate key title"),
        ("columns:", "columns: [", r"cannot be read"),
        ("  macs: {", "  label: {", r"'label' is the row's own name"),
    ],
)
def test_malformed_files_are_refused_by_name(path, old, new, message):
    assert TABLE.count(old) >= 1
    path.write_text(TABLE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as error:
        load_table(path)
    assert str(path) in str(error.value)


def test_means_name_earlier_columns(path):
    path.write_text("title: T\ncolumns: {m: {mean_of: [a]}, a: {}}\nrows: []\n")
    with pytest.raises(ConfigError, match=r"columns\.m\.mean_of: no earlier column 'a'"):
        load_table(path)


def test_a_row_whose_experiment_does_not_exist_is_named(path, lab):
    path.write_text(TABLE.replace("experiment: mine/tiny", "experiment: mine/tinny", 1))
    with pytest.raises(ConfigError, match=r"points\.yaml: row 'base': .*mine/tiny"):
        shown(path, lab)


def test_tables_are_found_by_folder(path, tmp_path):
    hidden = tmp_path / ".cache" / "tables" / "x.yaml"
    hidden.parent.mkdir(parents=True)
    hidden.write_text(TABLE)
    paths = find_tables([tmp_path])
    assert list(paths) == ["mine/points"]
    listed = as_dict(list_tables(paths))["rows"]
    assert listed[0]["table"]["value"] == "mine/points"
    assert listed[0]["about"]["value"] == "Points"
    assert listed[0]["computed"]["value"] == "params, macs, MACs"
