"""What the tests of cards share: a card's tables and sentences, and the stored results that they are held against."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Container
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def stored(file: str) -> dict[str, Any]:
    """A JSON file below `results/`, without its suffix."""
    return json.loads((RESULTS / f"{file}.json").read_text())


def runs(claim: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """A row's runs, in order of seeds; none where the claim has no such row."""
    found = next((row["runs"] for row in claim["rows"] if row["label"] == label), [])
    return sorted(found, key=lambda run: run["seed"])


def values(claim: dict[str, Any], label: str, metric: str, seeds: Container[int] | None = None) -> list[float]:
    """A metric of every run of a row, in order of seeds."""
    found = [run for run in runs(claim, label) if seeds is None or run["seed"] in seeds]
    assert found, f"no runs of {label}"
    return [run["metrics"][metric] for run in found]


def comparison(claim: dict[str, Any], better: str, than: str, metric: str | None = None) -> dict[str, Any]:
    """A judged comparison; `metric` None is the claim's."""
    metric = metric or claim["definition"]["metric"]
    (found,) = (
        one for one in claim["comparisons"] if (one["better"], one["than"], one["metric"]) == (better, than, metric)
    )
    return found


def numbers(text: str) -> list[str]:
    """The numbers of a text, as they are printed."""
    return re.findall(NUMBER, text)


def agree(printed: str, value: float) -> None:
    """Asserts that a printed number is the stored one rounded to as many digits."""
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    assert abs(float(printed.replace(",", "")) - value) <= half * (1 + 1e-9), (printed, value)


def agree_mean(text: str, found: list[float]) -> None:
    """`0.748 ± 0.009` against the mean and deviation of what is stored, or the mean alone."""
    mean, *deviation = numbers(text)
    agree(mean, statistics.fmean(found))
    for one in deviation:
        agree(one, statistics.stdev(found))


def agree_interval(text: str, found: dict[str, Any]) -> None:
    """`0.107 to 0.182` against a comparison's Student interval; of factors `x 1.74 to x 6.06`."""
    scale = math.exp if found["kind"] == "factor" else float
    low, high = numbers(text)
    agree(low, scale(found["interval95"][0]))
    agree(high, scale(found["interval95"][1]))


def agree_ratio(text: str, ours: list[float], others: list[float]) -> None:
    """`10.7 (10.4 to 11.2)` against median and range of the rounds' ratios, others over ours."""
    ratios = [other / one for one, other in zip(ours, others, strict=True)]
    for printed, value in zip(numbers(text), (statistics.median(ratios), min(ratios), max(ratios)), strict=True):
        agree(printed, value)


def table(text: str, first: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table whose header begins with these cells."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return header, rows


def sentence(text: str, pattern: str) -> re.Match[str]:
    """Where a text says this; blanks stand for any white space, `#` for a number and its deviation."""
    expression = r"\s+".join(
        re.escape(word).replace(r"\#", rf"({NUMBER}(?:\s±\s{NUMBER})?)") for word in pattern.split()
    )
    found = re.search(expression, text)
    assert found, f"no longer said: {pattern}"
    return found
