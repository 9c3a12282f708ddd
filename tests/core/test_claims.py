"""Claims: hand-computed statistics, the four kinds of comparison, what is stored, and what makes it stale."""

import json
import math
import shutil

import pytest
from lab import Lab

from core.engine.launch import build_trainer
from core.errors import ConfigError
from core.output.render import as_dict, render_all
from core.tables.claim_file import FAILS, HOLDS, OPEN, Comparison, load_claim, overall
from core.tables.claim_store import ClaimStore, run_record
from core.tables.claims import claims_table, show_claim
from core.tables.paired import Paired, mean_and_deviation
from core.tables.table import Options, find_tables, list_tables

CLAIM = """
statement: Deep is better than shallow.
metric: accuracy
direction: higher
seeds: [0, 1, 2]
rows:
  - {label: deep, role: ours, experiment: mine/tiny, overrides: [model.network.depth=4]}
  - {label: full, role: baseline, experiment: mine/tiny, overrides: [model.network.depth=6]}
  - {label: shallow, role: control, experiment: mine/tiny, overrides: [model.network.depth=1]}
comparisons:
  - {better: deep, than: shallow}
  - {better: deep, than: full, within: 0.02}
  - {better: deep, than: full, metric: macs, direction: lower, factor: 1.4}
setting: [fixed before the seeds were run]
report: [macs, seen]
"""
TABLE = """
title: sizes
columns:
  parameters: {label: parameters, needs: none}
rows:
  - {label: deep, experiment: mine/tiny}
"""
SCORES = {4: (0.90, 0.92, 0.91), 6: (0.91, 0.92, 0.915), 1: (0.80, 0.83, 0.81)}


def score(cfg):
    return {"accuracy": SCORES[cfg["model"]["network"]["depth"]][cfg["seed"]], "seen": 21}


@pytest.fixture
def lab(user, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    return Lab(user, tmp_path / "runs", score)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mine" / "tables" / "claim.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(CLAIM)
    return path


def show(path, lab, overrides=(), **options):
    settings = Options(runs_dir=str(lab.runs), **options)
    return show_claim(path, settings, overrides, compose=lab.compose, runner=lab.run, build=build_trainer)


def verdicts(tables):
    return [row["verdict"]["value"] for row in as_dict(tables[1])["rows"]]


def stored(tmp_path):
    return json.loads((tmp_path / "results" / "claims" / "mine.json").read_text())


# --- statistics -----------------------------------------------------------------------------------------------------


def test_paired_statistics_by_hand():
    """Differences 1, 2, 6: mean 3, deviation sqrt(7), error sqrt(7/3); t(0.975, 2) = 4.3027."""
    pairs = Paired.of({0: 11.0, 1: 22.0, 2: 36.0, 9: 0.0}, {0: 10.0, 1: 20.0, 2: 30.0, 3: 5.0})
    assert pairs.differences == (1.0, 2.0, 6.0)
    assert pairs.mean == 3.0
    assert pairs.error == pytest.approx(math.sqrt(7 / 3))
    assert pairs.bounds == pytest.approx((3 - 2 * math.sqrt(7 / 3), 3 + 2 * math.sqrt(7 / 3)))
    assert pairs.interval == pytest.approx((3 - 4.30265 * math.sqrt(7 / 3), 3 + 4.30265 * math.sqrt(7 / 3)), rel=1e-5)
    assert not pairs.clear
    assert Paired((1.0, 1.0)).clear
    assert Paired((-1.0, -1.1)).clear
    assert (Paired((1.0,)).mean, Paired((1.0,)).error, Paired(()).mean) == (1.0, None, None)
    assert not Paired((1.0,)).clear
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_and_deviation([1.0]) == (1.0, None)
    assert mean_and_deviation([]) == (None, None)


def judged(differences, kind="by", margin=0.0, direction="higher"):
    base = {i: 10.0 for i in range(len(differences))}
    changed = {i: 10.0 + d for i, d in enumerate(differences)}
    return Comparison("a", "b", "m", direction, kind, margin).judge(changed, base)[1]


def test_better_means_more_than_twice_the_error():
    assert judged([1.0, 2.0, 6.0]) == FAILS  # 3 < 2 * 1.5275
    assert judged([1.0, 2.0, 5.0]) == HOLDS  # 2.667 > 2 * 1.2019
    assert judged([-1.0, -2.0, -3.0]) == FAILS
    assert judged([-1.0, -2.0, -3.0], direction="lower") == HOLDS
    assert judged([0.0, 0.0]) == FAILS  # equal is not better
    assert judged([5.0]) == OPEN  # one seed has no error
    assert judged([2.0, 2.1], margin=1.5) == HOLDS
    assert judged([2.0, 2.1], margin=2.0) == FAILS  # 2.05 - 0.1 < 2


def test_within_asks_for_evidence_not_for_luck():
    assert judged([-0.5, -0.6, -0.4], "within", 1.0) == HOLDS
    assert judged([-1.4, 0.6, -0.4], "within", 1.0) == FAILS  # the mean is within, its error is not
    assert judged([-1.5, -1.6, -1.4], "within", 1.0) == FAILS
    assert judged([0.5, 0.6, 0.4], "within", 1.0, "lower") == HOLDS


def test_factor_compares_ratios():
    better, than = {0: 2.0, 1: 4.2}, {0: 1.0, 1: 2.0}
    pairs, verdict = Comparison("a", "b", "m", "higher", "factor", 1.8).judge(better, than)
    assert math.exp(pairs.mean) == pytest.approx(math.sqrt(2.0 * 2.1))
    assert verdict == HOLDS
    assert Comparison("a", "b", "m", "higher", "factor", 2.1).judge(better, than)[1] == FAILS
    assert Comparison("a", "b", "m", "lower", "factor", 1.8).judge(than, better)[1] == HOLDS


def test_exact_figures_need_no_seeds():
    comparison = Comparison("a", "b", "macs", "lower", "factor", 2.0)
    assert comparison.judge({None: 1.0}, {None: 2.5})[1] == HOLDS
    assert comparison.judge({None: 1.0}, {None: 1.5})[1] == FAILS


def test_a_claim_holds_when_everything_does():
    assert overall([HOLDS, HOLDS]) == HOLDS
    assert overall([HOLDS, OPEN]) == OPEN
    assert overall([OPEN, FAILS, HOLDS]) == FAILS


# --- running and storing --------------------------------------------------------------------------------------------


def test_without_runs_nothing_is_decided_and_nothing_written(path, lab, tmp_path):
    tables, failures = show(path, lab)
    assert verdicts(tables) == [OPEN, OPEN, HOLDS]  # multiply-accumulates need no run
    assert failures == []
    rows = as_dict(tables[0])["rows"]
    assert rows[0]["accuracy"] == {"value": None}
    assert rows[0]["macs"]["value"] == 8 * 16 + 4 * 256 + 32
    assert any("run=true trains them" in note for note in as_dict(tables[0])["notes"])
    assert not (tmp_path / "results").exists()
    assert lab.trained == []


def test_run_trains_judges_and_stores(path, lab, tmp_path):
    tables, _ = show(path, lab, ["runtime=cpu"], run=True)
    assert len(lab.trained) == 9
    assert {cfg["runtime"]["device"] for cfg in lab.trained} == {"cpu"}
    assert verdicts(tables) == [HOLDS, HOLDS, HOLDS]
    record = stored(tmp_path)
    assert record["holds"] == HOLDS
    assert record["command"] == "python tools/table.py mine/claim run=true runtime=cpu"
    first = record["comparisons"][0]
    assert first["differences"] == pytest.approx([0.10, 0.09, 0.10])
    assert first["mean"] == pytest.approx(0.29 / 3)
    assert first["standard_error"] == pytest.approx(0.01 / 3)  # deviation 0.01/sqrt(3), over sqrt(3)
    assert record["comparisons"][2]["mean"] == pytest.approx(math.log((160 + 6 * 256) / (160 + 4 * 256)))
    deep = record["rows"][0]
    assert (deep["label"], deep["role"]) == ("deep", "ours")
    assert [run["metrics"]["accuracy"] for run in deep["runs"]] == list(SCORES[4])
    run = deep["runs"][0]
    assert (run["seed"], run["commit"], run["versions"], run["device"]) == (0, "c0ffee", {"torch": "2"}, "abacus")
    assert run["overrides"] == ["experiment=mine/tiny", "model.network.depth=4", "runtime=cpu"]
    assert str(tmp_path) not in json.dumps(record)  # no place on a machine
    text = render_all(tables, "text")
    assert "The claim holds." in text
    assert "× 1.432" in text


def test_a_claim_that_fails_is_printed_like_one_that_holds(path, lab, tmp_path):
    lab.score = lambda cfg: {"accuracy": 0.5 + 0.1 * cfg["seed"] * (cfg["model"]["network"]["depth"] == 4), "seen": 21}
    tables, _ = show(path, lab, run=True)
    assert verdicts(tables) == [FAILS, HOLDS, HOLDS]  # 0.1 < 2 * 0.0577, but 0.1 - 0.1155 > -0.02
    assert stored(tmp_path)["holds"] == FAILS
    row = as_dict(tables[1])["rows"][0]
    assert row["difference"] == {"value": pytest.approx(0.1), "spread": pytest.approx(0.1 / math.sqrt(3)), "count": 3}
    assert row["interval"]["value"] == "-0.1484 to 0.3484"


def test_what_is_stored_is_not_trained_again(path, lab, tmp_path):
    show(path, lab, run=True)
    for file in lab.runs.rglob("*.*"):
        file.unlink()  # the runs' folders are gone, the record is not
    tables, _ = show(path, lab, run=True)
    assert len(lab.trained) == 9
    assert verdicts(tables) == [HOLDS, HOLDS, HOLDS]


def test_only_trains_one_row_and_an_interruption_keeps_what_is_done(path, lab, tmp_path):
    from core.config.command.signals import Interrupted

    show(path, lab, run=True, only="shallow")
    assert [cfg["model"]["network"]["depth"] for cfg in lab.trained] == [1, 1, 1]
    train, count = lab.run, len(lab.trained) + 2

    def run(cfg):
        if len(lab.trained) == count:
            raise Interrupted("stopped")
        return train(cfg)

    lab.run = run
    with pytest.raises(Interrupted):
        show(path, lab, run=True)
    assert [len(row["runs"]) for row in stored(tmp_path)["rows"]] == [2, 0, 3]
    assert stored(tmp_path)["holds"] == OPEN
    lab.run = train
    show(path, lab, run=True)
    assert len(lab.trained) == 9
    with pytest.raises(ConfigError, match="did you mean 'shallow'"):
        show(path, lab, run=True, only="shalow")
    with pytest.raises(ConfigError, match="seeds are fixed"):
        show(path, lab, seeds=5)


def test_a_failed_run_leaves_its_comparisons_undecided(path, lab, tmp_path):
    lab.fail_on = lambda cfg: cfg["model"]["network"]["depth"] == 1 and cfg["seed"] == 2
    tables, failures = show(path, lab, run=True)
    assert failures == ["shallow, seed 2: the disc is on fire"]
    assert verdicts(tables) == [OPEN, HOLDS, HOLDS]  # two of three seeds decide nothing
    assert stored(tmp_path)["holds"] == OPEN


def test_fresh_starts_anew_and_replaces_the_record_at_the_end(path, lab, tmp_path):
    from core.config.command.signals import Interrupted

    show(path, lab, run=True)
    train = lab.run

    def stop(cfg):
        if len(lab.trained) >= 12:
            raise Interrupted("stopped")
        return train(cfg)

    lab.run = stop
    lab.score = lambda cfg: {"accuracy": 0.5, "seen": 21}
    before = stored(tmp_path)
    with pytest.raises(Interrupted):
        show(path, lab, run=True, fresh=True)
    assert stored(tmp_path) == before
    lab.run = train
    show(path, lab, run=True, fresh=True, only="shallow")
    record = stored(tmp_path)
    assert [run["metrics"]["accuracy"] for run in record["rows"][2]["runs"]] == [0.5, 0.5, 0.5]
    assert [run["metrics"]["accuracy"] for run in record["rows"][0]["runs"]] == list(SCORES[4])


def test_measured_figures_take_part_with_their_rounds(path, lab, tmp_path):
    text = CLAIM.replace(
        "setting:", "  - {better: shallow, than: slow, metric: throughput, direction: higher, factor: 1.2}\nsetting:"
    ).replace(
        "comparisons:",
        "  - {label: slow, role: baseline, experiment: mine/tiny, overrides: [model.network.depth=60]}\ncomparisons:",
    )
    path.write_text(text + "profile: {batch: 4, repeats: 3, threads: 1, device: cpu}\n")
    SCORES[60] = (0.1, 0.1, 0.1)
    assert verdicts(show(path, lab)[0])[-1] == OPEN  # not measured unless asked
    tables, _ = show(path, lab, run=True)
    record = stored(tmp_path)
    assert verdicts(tables)[-1] == HOLDS
    assert len(record["comparisons"][-1]["differences"]) == 3
    assert "batch 4, 3 rounds" in record["figures"]["throughput"]["on"]
    again, _ = show(path, lab)
    assert as_dict(again[1])["rows"][-1] == as_dict(tables[1])["rows"][-1]  # stored, not measured again


# --- all claims, stale ones -----------------------------------------------------------------------------------------


def states(tmp_path, lab):
    table = claims_table(find_tables([tmp_path]), compose=lab.compose)
    return [row["state"]["value"] for row in as_dict(table)["rows"]]


def test_claims_shows_what_is_stored_and_what_is_stale(path, lab, tmp_path, monkeypatch):
    assert states(tmp_path, lab) == ["missing"]
    show(path, lab, ["runtime=cpu"], run=True)
    assert states(tmp_path, lab) == ["current"] * 3
    path.write_text(CLAIM.replace("Deep is better", "Deep is really better").replace("[fixed", "[words, fixed"))
    assert states(tmp_path, lab) == ["current"] * 3  # other words, same claim
    path.write_text(CLAIM.replace("within: 0.02", "within: 0.03"))
    assert states(tmp_path, lab) == ["stale: claim.yaml has changed since"] * 3
    path.write_text(CLAIM)
    compose = lab.compose
    lab.compose = lambda overrides: compose([*overrides, "optim_wrapper.optimizer.lr=0.5"])
    assert states(tmp_path, lab) == ["stale: the config of row 'deep' has changed since"] * 3


def test_a_paper_can_have_further_claims(path, lab, tmp_path):
    further = path.with_name("claim_cheap.yaml")
    further.write_text(CLAIM.replace("Deep is better", "Deep is cheaper").replace("within: 0.02", "within: 0.5"))
    (path.parent / "claims_of_others.yaml").write_text(TABLE)  # a table: only claim.yaml and claim_NAME.yaml are claims
    assert states(tmp_path, lab) == ["missing", "missing"]
    show(path, lab, run=True)
    first = stored(tmp_path)
    shutil.rmtree(lab.runs)  # as on another machine, where only results/claims/ is
    show(further, lab, run=True)
    assert len(lab.trained) == 9  # rows of another claim with the same configs are no reason to train again
    assert stored(tmp_path) == first
    second = json.loads((tmp_path / "results" / "claims" / "mine_cheap.json").read_text())
    assert (first["claim"], second["claim"]) == ("mine/claim", "mine/claim_cheap")
    assert second["command"] == "python tools/table.py mine/claim_cheap run=true"
    assert (first["comparisons"][1]["margin"], second["comparisons"][1]["margin"]) == (0.02, 0.5)
    assert states(tmp_path, lab) == ["current"] * 6
    further.write_text(further.read_text().replace("within: 0.5", "within: 0.4"))
    assert states(tmp_path, lab) == ["current"] * 3 + ["stale: claim_cheap.yaml has changed since"] * 3
    listed = as_dict(list_tables(find_tables([tmp_path])))["rows"]
    assert [(row["table"]["value"], row["about"]["value"]) for row in listed] == [
        ("mine/claim", "Deep is better than shallow."),
        ("mine/claim_cheap", "Deep is cheaper than shallow."),
        ("mine/claims_of_others", "sizes"),
    ]


def test_a_changed_config_is_trained_again(path, lab, tmp_path):
    show(path, lab, run=True)
    compose = lab.compose
    lab.compose = lambda overrides: compose([*overrides, "optim_wrapper.optimizer.lr=0.5"])
    show(path, lab, run=True)
    assert len(lab.trained) == 18


def test_damaged_records_are_named(path, lab, tmp_path):
    store = ClaimStore.of(path)
    store.path.parent.mkdir(parents=True)
    store.path.write_text("{")
    with pytest.raises(ConfigError, match=r"mine\.json is damaged"):
        show(path, lab)
    further = path.with_name("claim_further.yaml")
    further.write_text(CLAIM)
    with pytest.raises(ConfigError, match=r"mine\.json is damaged"):
        show(further, lab)  # which may share runs with it


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("direction: higher\nseeds", "direction: up\nseeds", r"direction: 'up' \(choose one of higher, lower\)"),
        ("metric: accuracy\n", "", r"'metric' is missing"),
        ("seeds: [0, 1, 2]", "seeds: [0]", r"seeds: at least two different seeds"),
        ("seeds: [0, 1, 2]", "seeds: [0, 0]", r"seeds: at least two different seeds"),
        ("role: control", "role: contrl", r"rows\[2\]\.role: 'contrl': did you mean 'control'"),
        ("than: shallow", "than: shalow", r"comparisons\[0\]\.than: no row 'shalow': did you mean 'shallow'"),
        ("than: shallow", "than: deep", r"comparisons\[0\]: a row is compared with itself"),
        ("within: 0.02", "within: 0.02, by: 1", r"by and within exclude each other"),
        ("within: 0.02", "within: -1", r"within: -1 has to be positive"),
        ("direction: lower, ", "", r"comparisons\[2\]: direction \(higher \| lower\) of 'macs' is missing"),
        ("direction: lower, ", "direction: low, ", r"comparisons\[2\]\.direction: 'low': did you mean 'lower'"),
        ("label: full", "label: deep", r"rows\[1\]: an earlier row is called 'deep'"),
        ("than: shallow}", "then: shallow}", r"comparisons\[0\]: unknown key 'then': did you mean 'than'"),
    ],
)
def test_malformed_claims_are_refused_by_name(path, old, new, message):
    assert old in CLAIM
    path.write_text(CLAIM.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as error:
        load_claim(path)
    assert str(path) in str(error.value)


def test_a_figure_that_nobody_computes_is_named_once_the_runs_are_there(path, lab):
    path.write_text(CLAIM.replace("report: [macs, seen]", "report: [macz]"))
    show(path, lab)  # it may still be a metric
    with pytest.raises(ConfigError, match=r"no figure 'macz'.*did you mean 'macs'"):
        show(path, lab, run=True)


def test_stored_evidence_says_whether_a_run_was_interrupted():
    result = {"seed": 1, "metrics": {"top1": 0.5}, "run_dir": "/home/someone/runs/a", "resumed_from": None}
    assert run_record(result, "print")["resumed_from"] is None
    result["resumed_from"] = "/home/someone/runs/a/checkpoints/step_00000004.pt"
    kept = run_record(result, "print")
    assert kept["resumed_from"] == "step_00000004.pt" and "someone" not in str(kept)
    assert "resumed_from" not in run_record({"seed": 1}, "print"), "a file of an older version stays as it is"
