"""The figures of the card and of results/SLOT_WALKS.md are those of the stored results, to the digits printed."""

from __future__ import annotations

import re
import statistics
from typing import Any

import pytest

from tests import cards
from tests.cards import ROOT, agree, agree_ratio, runs, table

CARD = (ROOT / "slot_walks" / "README.md").read_text()
HISTORY = (ROOT / "results" / "SLOT_WALKS.md").read_text()
TEXT = f"{CARD}\n\n{HISTORY}"
WORDS = " ".join(TEXT.split())
WORLDS = {"drawn scenes": ("both", "untrained"), "digits": ("digits",), "digits, learned features": ("digits_vit",)}
ROWS = ["untrained slots", "both walks", "W-P-W alone", "P-W-P alone", "k-means of each image"]
METRICS = ["mbo_i", "fg_ari", "segments_in_use", "background_pieces", "gradient_cosine"]
CURVES = cards.stored("slot_walks_curves")["runs"]


def stored(name: str = "") -> dict[str, Any]:
    return cards.stored(f"claims/slot_walks{name and '_'}{name}")


def comparison(claim: dict[str, Any], better: str, than: str) -> dict[str, Any] | None:
    return next((one for one in claim["comparisons"] if (one["better"], one["than"]) == (better, than)), None)


def agree_mean(text: str, values: list[float]) -> None:
    """As `cards.agree_mean`; an empty cell where there is nothing."""
    assert bool(text) == bool(values)
    if text:
        cards.agree_mean(text, values)


@pytest.mark.parametrize("world", WORLDS)
def test_tables_of_the_worlds(world: str) -> None:
    claims = [stored(name) for name in WORLDS[world]]
    _, rows = table(TEXT, f"{world} | mBO")
    assert [row[0] for row in rows] == ROWS
    for label, *cells in rows:
        found = next(found for claim in claims if (found := runs(claim, label)))
        assert [run["seed"] for run in found] == list(range(11, 18))
        for text, metric in zip(cells, METRICS, strict=True):
            agree_mean(text, [run["metrics"][metric] for run in found if metric in run["metrics"]])


def test_what_holds_and_what_does_not() -> None:
    header, rows = table(TEXT, "difference of mBO")
    assert header[1:] == list(WORLDS) and len(rows) == 8
    for label, *cells in rows:
        better, than = label.split(" over ")
        for text, names in zip(cells, WORLDS.values(), strict=True):
            found = next((one for name in names if (one := comparison(stored(name), better, than))), None)
            assert bool(text) == (found is not None), label
            if found is not None:
                mean, error, verdict = re.fullmatch(r"([+-]\S+) ± (\S+) (.+)", text).groups()
                agree(mean, found["mean"])
                agree(error, found["standard_error"])
                assert verdict == found["verdict"]


def test_walks_lift_untrained_slots_on_every_seed_of_every_world() -> None:
    assert "on every one of seven fresh seeds (11 to 17) and in every world tried" in WORDS
    for name in ("untrained", "digits", "digits_vit"):
        for walks in ("both walks", "W-P-W alone", "P-W-P alone"):
            differences = comparison(stored(name), walks, "untrained slots")["differences"]
            assert len(differences) == 7 and min(differences) > 0, (name, walks)


def test_seconds_of_the_stored_trainings() -> None:
    low, high = re.search(r"The stored runs, 450 steps of 16 scenes, took (\d+) to (\d+) seconds", WORDS).groups()
    labels = ("both walks", "W-P-W alone", "P-W-P alone")
    seconds = [
        run["seconds"]
        for name in ("untrained", "digits", "digits_vit")
        for label in labels
        for run in runs(stored(name), label)
    ]
    agree(low, min(seconds))
    agree(high, max(seconds))


def test_table_of_decoders_and_their_curves() -> None:
    claim = stored()
    _, rows = table(TEXT, "trained by")
    assert [row[0] for row in rows] == [row["label"] for row in claim["rows"]]
    for label, mbo, fg_ari, slots, gap in rows:
        found = runs(claim, label)
        for text, metric in zip((mbo, fg_ari, slots), ("mbo_i", "fg_ari", "segments_in_use"), strict=True):
            agree_mean(text, [run["metrics"][metric] for run in found])
        against = comparison(claim, "both walks", label)
        assert bool(gap) == (against is not None)
        if against is not None:
            mean, error = gap.split(" ± ")
            agree(mean, against["mean"])
            agree(error, against["standard_error"])
    said = re.search(r"On each of the (\w+) seeds that were run both walks are better than every decoder", WORDS)
    for one in claim["comparisons"]:
        assert len(one["differences"]) == ["zero", "one", "two", "three", "four", "five", "six", "seven"].index(said[1])
        assert min(one["differences"]) > 0
    said = (
        "MLP decoder at equal steps is worse than untrained slots, the transformer at equal seconds as good as they are"
    )
    assert said in WORDS
    means = {row["label"]: statistics.fmean(run["metrics"]["mbo_i"] for run in row["runs"]) for row in claim["rows"]}
    untrained = means["untrained, masks of the attention"]
    assert means["MLP decoder, equal steps and seconds"] < untrained - 0.05
    assert abs(means["transformer decoder, equal seconds"] - untrained) < 0.01
    for name, label in (("mlp", "MLP decoder, at its best"), ("transformer", "transformer decoder, at its best")):
        seeds = {run["seed"] for run in runs(claim, label)}
        curves = {f"slot_walks/blobworld_{name}, 1500 steps, seed {seed}" for seed in seeds}
        assert curves and curves <= set(CURVES), "the loss of every decoder that was trained for long is kept"
        assert all(any("loss_reconstruction" in record for record in CURVES[one]) for one in curves)


def test_what_is_said_of_the_losses() -> None:
    """How much less the losses are at step 1,500 than at step 750, over the seeds."""
    for name, pattern in (
        ("mlp", r"\((\d+) to (\d+) % less from step 750 to 1,500\)"),
        ("transformer", r"still falls \((\d+) to (\d+) % there\)"),
    ):
        falls = []
        for run, records in CURVES.items():
            if run.startswith(f"slot_walks/blobworld_{name}, 1500 steps"):
                loss = {one["step"]: one["loss_reconstruction"] for one in records if "loss_reconstruction" in one}
                falls.append(100 * (1 - loss[1500] / loss[750]))
        low, high = re.search(pattern, WORDS).groups()
        agree(low, min(falls))
        agree(high, max(falls))


def test_the_two_trainings_that_went_on() -> None:
    """Highest mBO of validation scenes and last loss, and that of the walks on the same seed."""
    said = re.search(
        r"MLP to 6,000 steps .*? at most ([\d.]+) with a loss of ([\d.]+) at the end; "
        r"transformer to 3,000: at most (\d\.\d+), (\d\.\d+)\. The walks' test scenes of that seed: (\d\.\d+)",
        WORDS,
    ).groups()
    for place, run in ((0, "mlp, 6000"), (2, "transformer, 3000")):
        records = CURVES[f"slot_walks/blobworld_{run} steps, seed 11"]
        agree(said[place], max(one["val/mbo_i"] for one in records if "val/mbo_i" in one))
        agree(said[place + 1], [one["loss_reconstruction"] for one in records if "loss_reconstruction" in one][-1])
    walks = next(run for run in runs(stored(), "both walks") if run["seed"] == 11)
    agree(said[4], walks["metrics"]["mbo_i"])


def test_mbo_of_every_seed() -> None:
    for claim in ("untrained", "digits", "digits_vit", ""):
        record = stored(claim)
        header, rows = table(HISTORY, f"slot_walks/claim{claim and '_'}{claim}")
        assert [row[0] for row in rows] == [row["label"] for row in record["rows"]]
        for label, *cells in rows:
            found = {str(run["seed"]): run["metrics"]["mbo_i"] for run in runs(record, label)}
            for seed, text in zip(header[1:], cells, strict=True):
                assert bool(text) == (seed in found)
                if text:
                    agree(text, found[seed])


def test_what_a_step_of_each_signal_takes() -> None:
    measured = cards.stored("tables/slot_walks_decoders")["measured"]
    rates, memory = measured["train_throughput"]["rows"], measured["train_memory"]["rows"]
    _, rows = table(HISTORY, "signal | parameters")
    assert len(rows) == len(rates) == 4
    for label, _, _, rate, times, megabytes in rows:
        key = next(name for name in rates if name.startswith(label))
        agree(rate, rates[key]["median"])
        agree(cards.numbers(megabytes)[0], memory[key]["median"] / 1e6)
        if label != "walks":
            agree_ratio(times, rates[key]["rounds"], rates["walks"]["rounds"])


def test_table_of_speed() -> None:
    _, rows = table(HISTORY, "what | command")
    kept = [cards.stored(f"benchmarks/slot_walks_{name}") for name in ("cache", "loss", "metrics")]
    cache, loss, metrics = kept[0]["cache"], kept[1]["loss"], kept[2]["seconds_per_round"]
    both = [ari + mbo for ari, mbo in zip(metrics["ari"], metrics["mbo"], strict=True)]
    pairs = [
        (cache["rounds"]["float32"], cache["rounds"]["pictures"]),
        (loss["rounds"]["stream"], loss["rounds"]["plain"]),
        (metrics["ours"], both),
    ]
    for (_, command, times, text), record, (ours, others) in zip(rows, kept, pairs, strict=True):
        assert record["command"] == f"python {command.strip('`')}"
        agree_ratio(times, ours, others)
        first, second = cards.numbers(text)[:2]
        agree(first, statistics.median(ours))
        agree(second, statistics.median(others))
    small, large, ratio = cards.numbers(rows[1][-1])[2:5]
    agree(small, loss["megabytes"]["stream"])
    agree(large, loss["megabytes"]["plain"])
    agree(ratio, loss["memory_ratio"])
