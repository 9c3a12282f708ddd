"""A table as text of a given width: no word and no figure is cut, whatever the width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from core.config.command.console import wrapped

if TYPE_CHECKING:
    from core.output.render import Column, Row, Table

_GAP = 3  # columns of space between two columns
_TEXT = 20  # a text is not squeezed into less while a block of its own would give it more


@dataclass(frozen=True)
class _Span:
    """A column's cells with the room they take: on one line, to be read well, and at the least."""

    align: str
    header: str
    cells: Sequence[str]
    natural: int
    comfortable: int
    least: int

    @classmethod
    def of(cls, table: Table, column: Column, rows: Sequence[Row]) -> _Span:
        header = f"{column.title}\n{column.group}" if column.group else column.title
        cells = [table.shown(row, column) for row in rows]
        figures = [c for row, c in zip(rows, cells, strict=True) if not isinstance(row.cell(column.key).value, str)]
        natural = max(map(len, [*header.split("\n"), *cells]))
        least = max(
            map(len, [*header.split(), *figures, *(word for cell in cells for word in cell.split())]), default=0
        )
        return cls(column.align, header, cells, natural, max(least, min(natural, _TEXT)), least)


def text(table: Table, width: int) -> str:
    """`table` in lines of `width` columns; only a word that is longer makes a longer line.

    Texts wrap inside their columns. Columns that do not fit beside each other follow in further blocks, each with the
    first column again. Title and notes take the whole width, and so does a section's heading that is longer than a
    line: its rows then have a grid of their own.
    """
    lines = [wrapped(table.title, width), ""]
    sections = list(dict.fromkeys(row.section for row in table.rows))
    if any(len(section) >= width for section in sections):
        for section in sections:
            lines += [
                wrapped(section, width),
                "",
                *_grids(table, [r for r in table.rows if r.section == section], width),
            ]
    else:
        lines += _grids(table, table.rows, width, headings=True)
    notes = [*(f"{letter} {mark}" for letter, mark in table.legend.items()), *table.notes]
    lines += [wrapped(note, width, "  ", "") for note in notes]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


def _grids(table: Table, rows: Sequence[Row], width: int, headings: bool = False) -> list[str]:
    """The rows in as many grids as their columns need; names stand before their rows, or above them.

    Above them is for long names: where they leave too little room, or where it makes fewer lines.
    """
    spans = [_Span.of(table, column, rows) for column in table.columns]
    sections = [row.section if headings else "" for row in rows]
    beside = list(_blocks(spans, [], sections, width))
    above = list(_blocks(spans[1:], spans[0].cells, sections, width))
    fits = 1 + spans[0].least + _GAP + max((span.least for span in spans[1:]), default=-_GAP) <= width
    return beside if fits and len(beside) <= len(above) else above


def _blocks(spans: Sequence[_Span], names: Sequence[str], sections: Sequence[str], width: int) -> Iterator[str]:
    """Lines of the grids; without `names` the first column is repeated in each."""
    repeated = [] if names else [spans[0]]
    margin = "    " if names else " "
    blocks = [repeated]
    for span in spans[len(repeated) :]:
        block = [*blocks[-1], span]
        if blocks[-1] != repeated and sum(s.comfortable for s in block) > _room(block, width, margin):
            block = [*repeated, span]
            blocks.append(block)
        blocks[-1] = block
    for block in blocks:
        widths = _widths(block, _room(block, width, margin))
        yield from _line(block, [span.header for span in block], widths, margin)
        yield " " + "─" * (len(margin) - 1 + sum(widths) + _GAP * (len(widths) - 1))
        folded = any(len(wrapped(cell, widths[0]).splitlines()) > 1 for span in repeated for cell in span.cells)
        section = ""
        for index, heading in enumerate(sections):
            if heading != section:
                section = heading
                yield from ["", f" {section}"] if index else [f" {section}"]
            elif folded and index:
                yield ""  # else nobody sees where the next name begins
            if names:
                yield from wrapped(names[index], width, "   ", " ").splitlines()
            yield from _line(block, [span.cells[index] for span in block], widths, margin)
        yield ""


def _room(block: Sequence[_Span], width: int, margin: str) -> int:
    """Characters for the cells of a line."""
    return width - len(margin) - _GAP * (len(block) - 1)


def _widths(block: Sequence[_Span], room: int) -> list[int]:
    """Every column as wide as it wants, or the widest ones cut to one level."""
    level = max((span.natural for span in block), default=0)
    while level and sum(max(span.least, min(span.natural, level)) for span in block) > room:
        level -= 1
    return [max(span.least, min(span.natural, level)) for span in block]


def _line(block: Sequence[_Span], cells: Sequence[str], widths: Sequence[int], margin: str) -> Iterator[str]:
    """Cells beside each other, in as many lines as the longest needs."""
    folded = [wrapped(cell, max(width, 1)).splitlines() for cell, width in zip(cells, widths, strict=True)]
    justify = {"left": str.ljust, "right": str.rjust, "center": str.center}
    for parts in zip_longest(*folded, fillvalue=""):
        placed = (justify[s.align](part, width) for s, part, width in zip(block, parts, widths, strict=True))
        yield margin + (" " * _GAP).join(placed)
