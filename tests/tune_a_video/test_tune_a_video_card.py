"""The figures of the card and of its history are those of the stored results, to the digits that are printed."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

import tune_a_video

ROOT = Path(tune_a_video.__file__).parents[1]
CARD = (ROOT / "tune_a_video" / "README.md").read_text()
HISTORY = (ROOT / "results" / "TUNE_A_VIDEO.md").read_text()
CLAIMS = sorted(path.stem for path in (ROOT / "tune_a_video" / "tables").glob("claim*.yaml"))
SECTIONS = [
    "Where it is in the code",
    "Use it in your code",
    "Commands",
    "Claim",
    "Measured here",
    "Differences from the authors",
    "Data",
    "Limits",
]


def stored(claim: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / "claims" / f"tune_a_video{claim.removeprefix('claim')}.json").read_text())


def row(claim: dict[str, Any], label: str) -> list[dict[str, Any]]:
    (found,) = (one["runs"] for one in claim["rows"] if one["label"] == label)
    return found


def comparison(claim: dict[str, Any], better: str, than: str, metric: str) -> dict[str, Any]:
    (found,) = (
        one for one in claim["comparisons"] if (one["better"], one["than"], one["metric"]) == (better, than, metric)
    )
    return found


def table(text: str, first: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table whose header begins with a cell."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines)
    return header, rows


def agree(printed: str, value: float) -> None:
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    assert abs(float(printed) - value) <= half * (1 + 1e-9), (printed, value)


def agree_runs(header: list[str], rows: list[list[str]], claim: dict[str, Any]) -> None:
    """Cells `mean ± deviation` of metrics against a claim's runs."""
    for label, *cells in rows:
        found = row(claim, label)
        assert len(found) == len(claim["definition"]["seeds"])
        for metric, cell in zip(header[1:], cells, strict=True):
            values = [run["metrics"][metric] for run in found]
            for text, figure in zip(cell.split(" ± "), (statistics.fmean, statistics.stdev), strict=True):
                agree(text, figure(values))


def said(pattern: str) -> tuple[str, ...]:
    """Numbers where the card says this; `#` stands for one."""
    expression = re.escape(" ".join(pattern.split())).replace("\\ ", " ").replace(r"\#", r"(-?\d+(?:\.\d+)?)")
    found = re.search(expression, " ".join(CARD.split()))
    assert found, f"the card no longer says: {pattern}"
    return found.groups()


def test_the_card_has_the_order_of_all_cards():
    assert re.findall(r"^## (.+)$", CARD, re.M) == SECTIONS
    assert 80 <= len(CARD.splitlines()) <= 150
    assert CARD.split("```sh\n")[1].startswith("make demo PAPER=tune_a_video")


def test_the_table_of_the_claim():
    claim = stored("claim")
    agree_runs(*table(CARD, "row"), claim)
    assert claim["holds"] == "does not hold" and "The claim as a whole **does not hold**" in CARD
    for metric in ("path", "agree"):
        assert comparison(claim, "Tune-A-Video", "the same from noise", metric)["verdict"] == "holds"


@pytest.mark.parametrize("name", CLAIMS)
def test_the_history_of_a_claim(name):
    claim = stored(name)
    header, rows = table(HISTORY, f"tune_a_video/{name}")
    assert [label for label, *_ in rows] == [one["label"] for one in claim["rows"]]
    agree_runs(header, rows, claim)
    _, rows = table(HISTORY, f"tune_a_video/{name}, comparison")
    assert len(rows) == len(claim["comparisons"])
    for (words, metric, mean, interval, verdict), one in zip(rows, claim["comparisons"], strict=True):
        assert (words, metric, verdict) == (one["words"], one["metric"], one["verdict"])
        agree(mean, one["mean"])
        for text, value in zip(interval.split(" to "), one["interval95"], strict=True):
            agree(text, value)


def test_what_is_said_of_agreement_with_inversion():
    claim = stored("claim_frames")
    found = said("the differences are # (t interval # to #) against spatial tuning and # (# to #)")
    for place, than in ((0, "spatial only"), (3, "untuned")):
        one = comparison(claim, "Tune-A-Video", than, "agree")
        for text, value in zip(found[place : place + 3], (one["mean"], *one["interval95"]), strict=True):
            agree(text, value)


def test_what_is_said_of_gaps():
    claim = stored("claim_gaps")
    found = said("nearer than untuned by # px (# to #) on base 0, # (# to #) on base 1 and # (# to #) on base 2")
    for base in range(3):
        one = comparison(claim, f"Tune-A-Video, base {base}", f"untuned, base {base}", "path_new")
        for text, value in zip(found[3 * base : 3 * base + 3], (one["mean"], *one["interval95"]), strict=True):
            agree(text, value)
    words = said("show their words (# for # on base 0)")
    for text, label in zip(words, ("Tune-A-Video, base 0", "untuned, base 0"), strict=True):
        agree(text, statistics.fmean(run["metrics"]["words"] for run in row(claim, label)))
