"""A claim and its evidence as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from core.output.render import Cell, Column, Row, Table
from core.tables.claim_file import Comparison, overall
from core.tables.paired import ERRORS, Paired, mean_and_deviation

if TYPE_CHECKING:
    from core.tables.claims import Evidence


def comparison_record(comparison: Comparison, pairs: Paired, verdict: str) -> dict[str, Any]:
    """A judged comparison as the JSON file keeps it."""
    return {
        **asdict(comparison),
        "words": comparison.words,
        "threshold": comparison.threshold,
        "differences": list(pairs.differences),
        "mean": pairs.mean,
        "standard_error": pairs.error,
        "interval95": None if pairs.interval is None else list(pairs.interval),
        "verdict": verdict,
    }


def rows_table(evidence: Evidence) -> Table:
    """What every row reached."""
    claim = evidence.claim
    names = list(dict.fromkeys([claim.metric, *claim.report]))
    columns = [Column("label", " ", align="left"), Column("role", align="left")]
    for name in names:
        columns.append(Column(name, better=claim.direction if name == claim.metric else "none"))  # type: ignore[arg-type]
    columns.append(Column("seconds", "training", "s per run"))
    rows = []
    for row in claim.rows:
        cells: dict[str, Any] = {"label": row.label, "role": row.role}
        for name in names:
            cells[name] = _cell(evidence, row.label, name)
        seconds = [run["seconds"] for (label, _), run in evidence.runs.items() if label == row.label]
        cells["seconds"] = mean_and_deviation(seconds)[0]
        rows.append(Row(cells))
    on = dict.fromkeys(figure["on"] for figure in evidence.figures.values() if "on" in figure)
    notes = [
        *claim.setting,
        "Metrics: mean ± standard deviation over seeds (number of seeds); measured: median of rounds.",
    ]
    notes += [f"Measured on {place}." for place in on]
    commits = dict.fromkeys(str(run.get("commit") or "unknown")[:10] for run in evidence.runs.values())
    if commits:
        notes.append(f"Runs of commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}.")
    if evidence.missing:
        absent = ", ".join(f"{label} (seed {seed})" for label, seed in evidence.missing)
        notes.append(f"Not trained: {absent}; run=true trains them.")
    return Table(claim.statement, columns, rows, notes, name=claim.id)


def _cell(evidence: Evidence, label: str, name: str) -> Cell:
    if name in evidence.figures:
        entry = evidence.figures[name]["rows"].get(label, {})
        return Cell(entry.get("value", entry.get("median")))
    values = list(evidence.values(label, name).values())
    mean, deviation = mean_and_deviation(values)
    return Cell(mean, deviation, len(values) or None)


def comparison_columns() -> list[Column]:
    """Columns of a table of comparisons."""
    return [
        Column("comparison", align="left"),
        Column("metric", align="left"),
        Column("difference", signed=True),
        Column("lower", "mean - 2 SE", signed=True),
        Column("threshold", "has to exceed"),
        Column("interval", "95 % interval (t)", align="center"),
        Column("verdict", align="left"),
    ]


def comparison_row(entry: Mapping[str, Any], section: str = "") -> Row:
    """A comparison as a row; the differences of a factor are shown as ratios."""
    ratio = entry["kind"] == "factor"
    shown = (lambda v: math.exp(v)) if ratio else float
    mean, error, interval = entry["mean"], entry["standard_error"], entry["interval95"]
    cells: dict[str, Any] = {
        "comparison": entry["words"],
        "metric": entry["metric"],
        "threshold": shown(entry["threshold"]),
        "verdict": entry["verdict"],
    }
    if mean is not None:
        if ratio:
            cells["difference"] = f"× {math.exp(mean):.4g}"
        else:
            cells["difference"] = Cell(mean, error, len(entry["differences"]))
        lower = mean - ERRORS * (error or 0.0)
        cells["lower"] = f"× {math.exp(lower):.4g}" if ratio else lower
    if interval is not None:
        cells["interval"] = " to ".join(f"{shown(end):.4g}" for end in interval)
    return Row(cells, section=section)


def verdicts_table(evidence: Evidence) -> Table:
    """Every comparison with its figures, whether it holds or not."""
    entries = [comparison_record(*entry) for entry in evidence.verdicts()]
    notes = [
        "difference: mean ± standard error of the paired differences (pairs), turned so that more is better.",
        f"The claim {overall([entry['verdict'] for entry in entries])}.",
    ]
    return Table("comparisons", comparison_columns(), [comparison_row(e) for e in entries], notes, name="comparisons")
