"""Tables as data, and their pictures: text, Markdown, CSV, JSON and PNG from one model.

A cell that nobody knows stays empty; a figure that needs a remark carries it as a footnote mark in every format.
Imports nothing heavy: matplotlib is loaded by the format that needs it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.config.command.console import WIDTH, terminal_width
from core.errors import ConfigError

FORMATS = ("text", "md", "csv", "json", "png")
Better = Literal["higher", "lower", "none"]
Scalar = int | float | str | bool | None

_SUFFIXES = {".txt": "text", ".md": "md", ".csv": "csv", ".json": "json", ".png": "png"}
_SUPERSCRIPTS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"
_ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}


@dataclass(frozen=True)
class Column:
    """One column: `key` names it in CSV and JSON, the rest says how people see it.

    `digits` are decimals (None: four significant ones, integers whole), `signed` shows ``+`` before gains, `group` is
    shown above neighbouring columns that share it, `better` puts an arrow beside the header.
    """

    key: str
    header: str = ""
    unit: str = ""
    align: Literal["left", "right", "center"] = "right"
    better: Better = "none"
    digits: int | None = None
    signed: bool = False
    group: str = ""

    @property
    def title(self) -> str:
        """Header with unit and direction, e.g. ``Top-1 [%] ↑``."""
        unit = f" [{self.unit}]" if self.unit else ""
        return f"{self.header or self.key}{unit}{_ARROWS[self.better]}"


@dataclass(frozen=True)
class Cell:
    """A figure with what is known about it: its `spread` (±), over how many values (`count`), a footnote (`mark`)."""

    value: Scalar = None
    spread: float | None = None
    count: int | None = None
    mark: str = ""

    @property
    def empty(self) -> bool:
        """Whether nothing is known."""
        return self.value is None


@dataclass(frozen=True)
class Row:
    """Cells by column key (plain values are fine); rows with the same `section` stand under a common heading."""

    cells: Mapping[str, Cell | Scalar]
    section: str = ""

    def cell(self, key: str) -> Cell:
        """The cell under `key`; an empty one where the row says nothing."""
        value = self.cells.get(key)
        return value if isinstance(value, Cell) else Cell(value)


@dataclass
class Table:
    """A titled list of rows; `notes` are printed below it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    name: str = ""
    _marks: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for row in self.rows:
            for column in self.columns:
                mark = row.cell(column.key).mark
                if mark and mark not in self._marks:
                    self._marks[mark] = _letter(len(self._marks))

    @property
    def legend(self) -> dict[str, str]:
        """Footnote letter -> its text, in order of appearance."""
        return {letter: text for text, letter in self._marks.items()}

    def shown(self, row: Row, column: Column) -> str:
        """A cell as people read it: ``79.8ᵃ``, ``94.3 ± 0.2 (3)``, or nothing."""
        cell = row.cell(column.key)
        if cell.empty:
            return ""
        text = number(cell.value, column.digits, signed=column.signed)
        if cell.spread is not None:
            text += f" ± {number(cell.spread, column.digits)}"
        if cell.count is not None:
            text += f" ({cell.count})"
        return text + (self._marks[cell.mark] if cell.mark else "")


def number(value: Scalar, digits: int | None = None, *, signed: bool = False) -> str:
    """`value` with `digits` decimals; without them integers stay whole and floats keep four significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    sign = "+" if signed and value > 0 else ""
    if not math.isfinite(value):
        return sign + str(float(value))
    if digits is not None:
        text = f"{value:,.{digits}f}"
    elif isinstance(value, numbers.Integral):
        text = f"{int(value):,}"
    elif value != 0 and not 1e-3 <= abs(value) < 1e6:
        text = f"{value:.3e}"
    else:
        decimals = 3 - math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:,.{max(0, decimals)}f}"
    return sign + text


def render(table: Table, format: str = "text", *, width: int | None = None) -> str | bytes:
    """`table` in one of `FORMATS`: a string, or bytes for ``png``.

    Args:
        table: what to show.
        format: text, md, csv, json or png.
        width: characters per line of the text format; None: `core.config.command.console.terminal_width`.

    Raises:
        ConfigError: unknown format.
    """
    return render_all([table], format, width=width)


def render_all(tables: Sequence[Table], format: str = "text", *, width: int | None = None) -> str | bytes:
    """Several tables as one document; JSON gives a list where there is more than one."""
    if format not in FORMATS:
        raise ConfigError(f"format={format}: choose one of {', '.join(FORMATS)}")
    if format == "png":
        return _png(tables)
    if format == "json":
        data = [as_dict(table) for table in tables]
        return json.dumps(data[0] if len(data) == 1 else data, indent=2, ensure_ascii=False) + "\n"
    from core.output.text import text

    parts = {"text": lambda t: text(t, width or terminal_width()), "md": _markdown, "csv": _csv}[format]
    if format == "csv" and len(tables) > 1:
        return "\n".join(f"# {table.title}\n{_csv(table)}" for table in tables)
    return "\n".join(parts(table) for table in tables)


def emit(
    tables: Table | Sequence[Table], format: str | None = None, output: str | Path | None = None, *, quiet: bool = False
) -> None:
    """Prints tables, or writes them to a file (its suffix decides where no format is given).

    Args:
        tables: one table or several.
        format: one of `FORMATS`; None: by the suffix of `output`, else text.
        output: file to write; parents are made. None: standard output.
        quiet: do not say where the file went.

    Raises:
        ConfigError: unknown format, or a picture bound for the terminal.
    """
    tables = [tables] if isinstance(tables, Table) else list(tables)
    format = resolve_format(format, output)
    if output is not None:
        data = render_all(tables, format, width=WIDTH)
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        if not quiet:
            print(f"wrote {path}", file=sys.stderr)
        return
    if format == "png":
        if sys.stdout.isatty():
            raise ConfigError("format=png is a picture: add output=FILE.png")
        sys.stdout.buffer.write(render_all(tables, "png"))
        return
    print(render_all(tables, format), end="")


def resolve_format(format: str | None, output: str | Path | None) -> str:
    """The format asked for, or the one that the file's suffix means, or text.

    Raises:
        ConfigError: unknown format.
    """
    if format is None:
        format = _SUFFIXES.get(Path(output).suffix.lower(), "text") if output is not None else "text"
    if format not in FORMATS:
        raise ConfigError(f"format={format}: choose one of {', '.join(FORMATS)}")
    return format


def as_dict(table: Table) -> dict[str, Any]:
    """The table as JSON-ready data: every cell ``{"value": ..., "spread"?, "count"?, "mark"?}``; unknown is null."""
    columns = [
        {"key": c.key, "header": c.header or c.key, "unit": c.unit, "better": c.better, "group": c.group}
        for c in table.columns
    ]
    rows = []
    for row in table.rows:
        entry: dict[str, Any] = {"section": row.section} if row.section else {}
        for column in table.columns:
            cell = row.cell(column.key)
            entry[column.key] = {"value": _plain(cell.value)}
            extra = {"spread": _plain(cell.spread), "count": cell.count, "mark": cell.mark or None}
            entry[column.key] |= {key: value for key, value in extra.items() if value is not None}
        rows.append(entry)
    return {"name": table.name, "title": table.title, "columns": columns, "rows": rows, "notes": list(table.notes)}


def _plain(value: Any) -> Any:
    """JSON knows no nan and no inf; they travel as words. Library scalars become Python's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(float(value))


def _letter(index: int) -> str:
    if index < len(_SUPERSCRIPTS):
        return _SUPERSCRIPTS[index]
    return "⁽" + str(index + 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) + "⁾"


def _footnotes(table: Table) -> list[str]:
    return [*(f"{letter} {text}" for letter, text in table.legend.items()), *table.notes]


def _headers(table: Table) -> list[str]:
    """Column titles with the group above, shown once per run of neighbours."""
    return [f"{c.title}\n{c.group}" if c.group else c.title for c in table.columns]


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", ", ") for cell in cells) + " |"

    rules = {"left": ":---", "right": "---:", "center": ":---:"}
    lines = [f"**{table.title}**", "", line(_headers(table)), line([rules[c.align] for c in table.columns])]
    section = ""
    for row in table.rows:
        if row.section != section:
            section = row.section
            lines.append(line([f"*{section}*", *[""] * (len(table.columns) - 1)]))
        lines.append(line([table.shown(row, column) for column in table.columns]))
    footnotes = _footnotes(table)
    return "\n".join([*lines, *(["", *(f"{note}  " for note in footnotes)] if footnotes else [])]) + "\n"


def _csv(table: Table) -> str:
    """Raw values at full precision; spread, count and mark get columns of their own where any cell has them."""
    fields: list[tuple[str, Column, str]] = []
    for column in table.columns:
        cells = [row.cell(column.key) for row in table.rows]
        fields.append((column.key, column, "value"))
        if any(cell.spread is not None for cell in cells):
            fields.append((f"{column.key}_spread", column, "spread"))
        if any(cell.count is not None for cell in cells):
            fields.append((f"{column.key}_n", column, "count"))
        if any(cell.mark for cell in cells):
            fields.append((f"{column.key}_mark", column, "mark"))
    sections = any(row.section for row in table.rows)
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([*(["section"] if sections else []), *(name for name, _, _ in fields)])
    for row in table.rows:
        values = [getattr(row.cell(column.key), attribute) for _, column, attribute in fields]
        writer.writerow([*([row.section] if sections else []), *("" if v is None else v for v in values)])
    return target.getvalue()


def _png(tables: Sequence[Table]) -> bytes:
    from matplotlib.figure import Figure

    line, size = 0.27, 10
    heights, widths = [], []
    for table in tables:
        sections = len({row.section for row in table.rows if row.section})
        lines = len(table.rows) + sections + 2.0 + 1.2 + 0.8 * len(_footnotes(table)) + 0.6
        heights.append(lines * line)
        columns = sum(_column_widths(table))
        widths.append(max(0.085 * columns, 0.075 * max(map(len, [table.title, *_footnotes(table)]))))
    figure = Figure(figsize=(max(widths) + 0.4, sum(heights)), dpi=160)
    top = 1.0
    for table, height in zip(tables, heights, strict=True):
        share = height / sum(heights)
        _draw(figure.add_axes((0.0, top - share, 1.0, share)), table, height, line, size)
        top -= share
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _column_widths(table: Table) -> list[int]:
    """Characters that each column needs, padding included."""
    widths = []
    for column, header in zip(table.columns, _headers(table), strict=True):
        texts = [*header.split("\n"), *(table.shown(row, column) for row in table.rows)]
        if column is table.columns[0]:
            texts += [row.section for row in table.rows]
        widths.append(max(map(len, texts)) + 3)
    return widths


def _draw(axes: Any, table: Table, height: float, line: float, size: int) -> None:
    """One table as text on axes of `height` inches: heading rule, rows, footnotes."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(height, 0)
    widths = _column_widths(table)
    figure_width = axes.figure.get_size_inches()[0]
    unit = 0.085 / figure_width
    lefts = [0.2 / figure_width + unit * sum(widths[:i]) for i in range(len(widths))]

    def put(index: int, y: float, text: str, **style: Any) -> None:
        align = table.columns[index].align
        inner = unit * (widths[index] - 2)
        x = lefts[index] + {"left": 0.0, "center": inner / 2, "right": inner}[align]
        axes.text(x, y, text, ha=align, va="center", fontsize=size, **style)

    y = 0.6 * line
    axes.text(lefts[0], y, table.title, ha="left", va="center", fontsize=size + 1, weight="bold")
    y += 1.3 * line
    for index, header in enumerate(_headers(table)):
        put(index, y, header, linespacing=1.1)
    y += 0.9 * line
    right = lefts[-1] + unit * widths[-1]
    axes.plot([lefts[0], right], [y, y], color="black", linewidth=0.8)
    section = ""
    for row in table.rows:
        if row.section != section:
            section = row.section
            y += line
            axes.text(lefts[0], y - 0.3 * line, section, ha="left", va="center", fontsize=size, style="italic")
        y += line
        for index, column in enumerate(table.columns):
            put(index, y - 0.3 * line, table.shown(row, column))
    y += 0.4 * line
    axes.plot([lefts[0], right], [y, y], color="black", linewidth=0.8)
    for note in _footnotes(table):
        y += 0.8 * line
        axes.text(lefts[0], y, note, ha="left", va="center", fontsize=size - 2)


def plot_differences(
    labels: Sequence[str],
    means: Sequence[float | None],
    errors: Sequence[float | None],
    path: str | Path,
    *,
    title: str,
    unit: str,
    points: Sequence[Sequence[float]] | None = None,
    better: Better = "none",
) -> Path:
    """Draws one line per label: its mean difference to the base with an error bar, and the single differences as dots.

    Args:
        labels: one per difference, drawn from the top.
        means: mean differences; None leaves the line empty.
        errors: half lengths of the bars, in `unit`; None draws no bar.
        path: PNG to write; parents are made.
        title: above the plot.
        unit: what the horizontal axis counts.
        points: the single differences behind each mean.
        better: colours gains and losses apart.

    Returns:
        The written file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.4 + 0.38 * len(labels)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    colours = {"gain": "#2a7f62", "loss": "#b3402a", "plain": "#33516e"}
    for y, (mean, error) in enumerate(zip(means, errors, strict=True)):
        if mean is None:
            continue
        kind = "plain"
        if better != "none" and mean != 0:
            kind = "gain" if (mean > 0) == (better == "higher") else "loss"
        axes.errorbar(mean, y, xerr=error, fmt="o", color=colours[kind], capsize=3, markersize=5)
        if points is not None:
            axes.plot(points[y], [y] * len(points[y]), ".", color=colours[kind], alpha=0.45, markersize=4)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", linewidth=0.3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
