"""The figures of the card and of results/TUNE_A_VIDEO.md are those of the stored results, to the digits printed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.cards import ROOT, agree, agree_interval, agree_mean, comparison, runs, sentence, stored, table, values
from tune_a_video.inference.doses import differences

CARD = (ROOT / "tune_a_video" / "README.md").read_text()
HISTORY = (ROOT / "results" / "TUNE_A_VIDEO.md").read_text()
ALL_CLAIMS = sorted(path.stem for path in (ROOT / "tune_a_video" / "tables").glob("claim*.yaml"))
NOT_RUN = ["claim_motion", "claim_noise_bases"]
CLAIMS = [name for name in ALL_CLAIMS if name not in NOT_RUN]


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


def test_claims_that_are_not_run_are_said_to_be_so() -> None:
    there = {path.stem for path in (ROOT / "results" / "claims").glob("tune_a_video*.json")}
    assert set(NOT_RUN) == {name for name in ALL_CLAIMS if f"tune_a_video{name.removeprefix('claim')}" not in there}
    limits = CARD.split("## Limits")[1]
    for name in NOT_RUN:
        assert f"`tune_a_video/{name}`" in limits
    assert "have not been run" in limits


def test_what_is_said_first() -> None:
    claim = claim_of("claim_noise")
    opening = CARD.split("\n## ")[0]
    gains = sentence(
        opening, "makes frames agree by # (# to #) more than spatial tuning alone and by # (# to #) more than no tuning"
    ).groups()
    for place, than in ((0, "spatial only"), (3, "untuned")):
        one = comparison(claim, "Tune-A-Video", than)
        agree_difference(gains[place : place + 3], one)
        assert one["verdict"] == "holds" and one["interval95"][0] > 0
    inverted = sentence(opening, "where agreement differs by # (# to #)").groups()
    agree_difference(inverted, comparison(claim_of("claim_frames"), "Tune-A-Video", "untuned"))


def test_table_from_noise() -> None:
    claim = claim_of("claim_noise")
    header, rows = table(CARD, "from noise")
    assert [label for label, *_ in rows] == [one["label"] for one in claim["rows"]]
    agree_runs(header, rows, claim)
    assert {one["verdict"] for one in claim["comparisons"]} == {"holds"}
    sentence(CARD, "All four comparisons hold.")
    _, clips = table(HISTORY, "agree of every clip")
    for label, *cells in clips:
        for text, value in zip(cells, values(claim, label, "agree"), strict=True):
            agree(text, value)


def test_doses() -> None:
    record = stored("tune_a_video_doses")
    for sides in record["clips"].values():
        assert sorted(sides) == [str(seed) for seed in claim_of("claim_noise")["definition"]["seeds"]]
    assert f"`{record['command']}`" in " ".join(HISTORY.split())
    again = differences(record["clips"], "Tune-A-Video", "untuned")
    assert again == record["doses"], "what is stored is not what the clips give"
    header, rows = table(CARD, "strength")
    assert [dose for dose, *_ in rows] == list(record["doses"])
    for dose, *cells in rows:
        for name, cell in zip(header[1:], cells, strict=True):
            one = record["doses"][dose][name]
            tuned, untuned, *difference = re.findall(r"-?[\d.]+", cell)
            agree(tuned, one["tuned"])
            agree(untuned, one["untuned"])
            for text, value in zip(difference, (one["difference"], *one["interval95"]), strict=True):
                agree(text, value)
    _, rows = table(HISTORY, "dose, reading")
    assert len(rows) == sum(len(readings) for readings in record["doses"].values())
    for label, tuned, untuned, mean, interval in rows:
        dose, name = label.split()
        one = record["doses"][dose][name]
        ends = (one["tuned"], one["untuned"], one["difference"], *one["interval95"])
        for text, value in zip((tuned, untuned, mean, *interval.split(" to ")), ends, strict=True):
            agree(text, value)


def test_what_is_said_of_gaps() -> None:
    claim = claim_of("claim_gaps")
    found = sentence(CARD, "untuned by # px (# to #) on base 0, # (# to #) on base 1 and # (# to #) on base 2").groups()
    for base in range(3):
        one = comparison(claim, f"Tune-A-Video, base {base}", f"untuned, base {base}")
        agree_difference(found[3 * base : 3 * base + 3], one)
    words = sentence(CARD, "show their words (# for # on base 0)").groups()
    for text, label in zip(words, ("Tune-A-Video, base 0", "untuned, base 0"), strict=True):
        agree_mean(text, values(claim, label, "words"))
