"""Text that fits the terminal: lines are wrapped between words, and no word is cut.

Imports nothing heavy, so that ``--help`` and ``--list`` answer at once.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping

WIDTH = 100  # columns where there is no terminal to ask: files, pipes

_ROOM = 30  # columns that a text needs beside a name; with fewer it stands below the name


def terminal_width() -> int:
    """Columns of the terminal, of the variable ``COLUMNS`` where it is set, or `WIDTH` where there is neither."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def wrapped(text: str, width: int | None = None, indent: str = "", first: str | None = None) -> str:
    """`text` in lines of at most `width` columns; a word that is longer stays whole on a line of its own.

    Args:
        text: words; its own line breaks are kept.
        width: columns per line; None: the terminal's.
        indent: before every line after the first.
        first: before the first line; None: `indent`.
    """
    width = terminal_width() if width is None else width
    lines: list[str] = []
    for line in text.split("\n"):
        start = indent if lines or first is None else first
        lines += textwrap.wrap(
            line,
            width,
            initial_indent=start,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [start.rstrip()]
    return "\n".join(lines)


def listing(entries: Mapping[str, str] | Iterable[tuple[str, str]], width: int | None = None) -> str:
    """Names with a text each, in two columns; below each other where the width leaves the texts too little room."""
    pairs = list(entries.items() if isinstance(entries, Mapping) else entries)
    width = terminal_width() if width is None else width
    column = max((len(name) for name, _ in pairs), default=0) + 2
    beside = width - column >= max([_ROOM, *(len(word) for _, text in pairs for word in text.split())])
    blocks = []
    for name, text in pairs:
        if beside:
            blocks.append(wrapped(text, width, " " * column, name.ljust(column)))
        else:
            blocks.append(name + (f"\n{wrapped(text, width, '    ')}" if text else ""))
    return "\n".join(block.rstrip() for block in blocks)


def prose(text: str, width: int | None = None) -> str:
    """A tool's teaching text: paragraphs are filled, indented lines (commands, tables) wrap each by itself."""
    width = terminal_width() if width is None else width
    blocks: list[str] = []
    paragraph: list[str] = []

    def fill() -> None:
        if paragraph:
            blocks.append(wrapped(" ".join(paragraph), width))
            paragraph.clear()

    for line in text.strip("\n").splitlines():
        if line[:1].strip():
            paragraph.append(line.strip())
            continue
        fill()
        blocks.append(folded(line, width))
    fill()
    return "\n".join(blocks)


def folded(line: str, width: int | None = None) -> str:
    """A line of its own (a command, an entry): what stands behind a gap stays there, or goes on lines of its own."""
    width = terminal_width() if width is None else width
    if len(line) <= width:
        return line.rstrip()
    indent = line[: len(line) - len(line.lstrip())]
    head, _, tail = line.strip().partition("   ")
    column = len(line) - len(tail.lstrip())
    if tail and width - column >= _ROOM:
        return wrapped(tail.strip(), width, " " * column, line[:column])
    if head.startswith(("python ", "torchrun ")):
        parts = [wrapped(head, width - 2, indent + "    ", indent).replace("\n", " \\\n")]
    else:
        parts = [wrapped(head, width, indent + "    ", indent)]
    if tail:
        parts.append(wrapped(tail.strip(), width, indent + "      "))
    return "\n".join(parts)
