"""The figures of the card and of results/PETL.md are those of the stored results, to the digits printed."""

from __future__ import annotations

import math
import statistics

import pytest
from scipy.stats import t

from tests import cards
from tests.cards import ROOT, agree, agree_mean, numbers, table

CARD = (ROOT / "petl" / "README.md").read_text()
HISTORY = (ROOT / "results" / "PETL.md").read_text()
CLAIM, SELECTORS = cards.stored("claims/petl"), cards.stored("claims/petl_selectors")


def percent(claim: dict, label: str) -> list[float]:
    return [100 * value for value in cards.values(claim, label, "top1")]


def test_rows_of_the_claim() -> None:
    _, rows = table(CARD, "row | right")
    assert len(rows) == len(CLAIM["rows"])
    ours = percent(CLAIM, "two stages")
    for label, right, gain, interval in rows:
        found = percent(CLAIM, label.strip("*").removesuffix(", its first stage"))
        assert len(found) == 8
        agree_mean(right, found)
        if gain:
            differences = [a - b for a, b in zip(ours, found, strict=True)]
            mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(8)
            half = float(t.ppf(0.975, 7)) * error
            agree(gain, mean)
            for text, value in zip(interval.split(" to "), (mean - half, mean + half), strict=True):
                agree(text, value)
    assert "**does not hold**" in CARD and CLAIM["holds"] == "does not hold"


def test_taylor_over_random() -> None:
    differences = [a - b for a, b in zip(percent(SELECTORS, "Taylor"), percent(SELECTORS, "random"), strict=True)]
    assert len(differences) == 8 and "+1.2 points, standard error 1.1" in CARD
    agree("1.2", statistics.fmean(differences))
    agree("1.1", statistics.stdev(differences) / math.sqrt(8))
    assert statistics.fmean(differences) < 2.4 * statistics.stdev(differences) / math.sqrt(8)
    agree("59.3", statistics.fmean(percent(CLAIM, "channels alone")))


@pytest.mark.parametrize("row", table(HISTORY, "row | 0 | 1")[1], ids=lambda row: row[0])
def test_rows_of_the_history(row: list[str]) -> None:
    label, *cells = row
    claim = CLAIM if any(one["label"] == label for one in CLAIM["rows"]) else SELECTORS
    found = percent(claim, label)
    for text, value in zip(cells[:8], found, strict=True):
        agree(text, value)
    agree(cells[8], statistics.fmean(found))
    agree(cells[9], statistics.stdev(found) / math.sqrt(8))


def test_parameters_of_the_card() -> None:
    """The counts by hand, beside those of tools/table.py petl/parameters."""
    rows = {row[0]: row[1] for row in table(CARD, "ViT-B/16 | parameters")[1]}
    norms, ttc = 25 * 2 * 768, 12 * (96 * 96 + 96)
    assert numbers(rows["LN-Tune, stage 1"]) == [f"{norms:,}"]
    assert numbers(rows["TTC, K = 96: both stages (stage 2 alone 111,744)"]) == [f"{norms + ttc:,}"]
    assert ttc == 111_744 and rows["LoRA of q and v, r = 8"] == f"{12 * 2 * 2 * 8 * 768:,}"
