"""The figures of the card and of results/TUNE_A_VIDEO.md are those of the stored results, to the digits printed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cards import ROOT, agree, agree_interval, agree_mean, comparison, runs, sentence, stored, table, values

CARD = (ROOT / "tune_a_video" / "README.md").read_text()
HISTORY = (ROOT / "results" / "TUNE_A_VIDEO.md").read_text()
CLAIMS = sorted(path.stem for path in (ROOT / "tune_a_video" / "tables").glob("claim*.yaml"))


def claim_of(name: str = "claim") -> dict[str, Any]:
    return stored(f"claims/tune_a_video{name.removeprefix('claim')}")


def agree_runs(header: list[str], rows: list[list[str]], claim: dict[str, Any]) -> None:
    """Cells `mean ± deviation` of metrics against all clips of a claim."""
    for label, *cells in rows:
        label = label.strip("*")
        assert [run["seed"] for run in runs(claim, label)] == claim["definition"]["seeds"]
        for metric, cell in zip(header[1:], cells, strict=True):
            agree_mean(cell, values(claim, label, metric))


def agree_difference(texts: tuple[str, ...], found: dict[str, Any]) -> None:
    """Mean and both ends of the t interval."""
    agree(texts[0], found["mean"])
    agree_interval(f"{texts[1]} to {texts[2]}", found)


def test_table_of_the_claim() -> None:
    claim = claim_of()
    agree_runs(*table(CARD, "row"), claim)
    assert claim["holds"] == "does not hold"
    sentence(CARD, "The claim as a whole **does not hold**")
    for metric in ("path", "agree"):
        assert comparison(claim, "Tune-A-Video", "the same from noise", metric)["verdict"] == "holds"


@pytest.mark.parametrize("name", CLAIMS)
def test_history_of_a_claim(name: str) -> None:
    claim = claim_of(name)
    header, rows = table(HISTORY, f"tune_a_video/{name}")
    assert [label for label, *_ in rows] == [one["label"] for one in claim["rows"]]
    agree_runs(header, rows, claim)
    _, rows = table(HISTORY, f"tune_a_video/{name}, comparison")
    assert len(rows) == len(claim["comparisons"])
    for (words, metric, mean, interval, verdict), one in zip(rows, claim["comparisons"], strict=True):
        assert (words, metric, verdict) == (one["words"], one["metric"], one["verdict"])
        agree(mean, one["mean"])
        agree_interval(interval, one)


def test_what_is_said_of_agreement_with_inversion() -> None:
    found = sentence(
        CARD, "the differences are # (t interval # to #) against spatial tuning and # (# to #) against none"
    )
    for place, than in ((0, "spatial only"), (3, "untuned")):
        one = comparison(claim_of("claim_frames"), "Tune-A-Video", than)
        agree_difference(found.groups()[place : place + 3], one)
        assert one["interval95"][0] < 0


def test_what_is_said_of_gaps() -> None:
    claim = claim_of("claim_gaps")
    found = sentence(CARD, "untuned by # px (# to #) on base 0, # (# to #) on base 1 and # (# to #) on base 2").groups()
    for base in range(3):
        one = comparison(claim, f"Tune-A-Video, base {base}", f"untuned, base {base}")
        agree_difference(found[3 * base : 3 * base + 3], one)
    words = sentence(CARD, "show their words (# for # on base 0)").groups()
    for text, label in zip(words, ("Tune-A-Video, base 0", "untuned, base 0"), strict=True):
        agree_mean(text, values(claim, label, "words"))
