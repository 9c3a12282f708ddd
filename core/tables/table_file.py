"""A paper's table as data: the YAML file, checked word by word.

See `load_table` for the format. Every error names the file, the place in it and the nearest valid word.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import ConfigError, nearest
from core.profile.figures import MeasureSettings

#: What a mark on a paper's figure says about where the figure comes from.
MARKS = {
    "from memory": "from memory",
    "uncertain": "uncertain",
    "note": "read in a third party's note on the paper",
    "cited": "read in another paper's table",
    "derived": "arithmetic on other figures",
    "code": "read in the released code",
    "log": "read in a released training log",
    "issue": "read in the project's issue thread",
    "readme": "read in the project's documentation",
    "counted": "counted on the official model",
    "measured": "measured on the official model",
}
BETTER = ("higher", "lower", "none")
NEEDS = ("none", "data", "gpu")
RELATIONS = ("change", "ratio", "difference")

_PREFIXES = {"K": 1e-3, "M": 1e-6, "G": 1e-9, "T": 1e-12}


@dataclass(frozen=True)
class PaperFigure:
    """What the paper says: a number or its own words, with the marks of its origin."""

    value: int | float | str | None
    footnote: str = ""


@dataclass(frozen=True)
class ColumnSpec:
    """A column of a table file; see `load_table`."""

    key: str
    label: str
    unit: str = ""
    better: str = "none"
    needs: str = "data"
    digits: int | None = None
    of: str = ""
    scale: float | None = None
    relative_to: str | None = None
    relation: str | None = None
    mean_of: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """What a computed or stored value is multiplied with to be in the column's unit."""
        if self.scale is not None:
            return self.scale
        first = self.unit.split(" ")[0].removesuffix("MACs").removesuffix("FLOPs")
        return _PREFIXES.get(first, 1.0) if self.needs == "none" else 1.0


@dataclass(frozen=True)
class RowSpec:
    """A row of a table file; see `load_table`."""

    label: str
    experiment: str | None = None
    overrides: tuple[str, ...] = ()
    paper: Mapping[str, PaperFigure] = field(default_factory=dict)
    section: str = ""
    relative_to: str | None = None
    cells: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    def source(self, column: ColumnSpec) -> tuple[str, tuple[str, ...]] | None:
        """Experiment and overrides behind this row's cell of a column; None where only the paper has the row."""
        if column.key in self.cells:
            experiment, overrides = self.cells[column.key]
        elif self.experiment is not None:
            experiment, overrides = self.experiment, self.overrides
        else:
            return None
        return experiment, (*overrides, *column.overrides)


@dataclass(frozen=True)
class TableSpec:
    """A whole table file."""

    path: Path
    id: str
    title: str
    source: str
    columns: tuple[ColumnSpec, ...]
    rows: tuple[RowSpec, ...]
    profile: MeasureSettings = field(default_factory=MeasureSettings)
    notes: tuple[str, ...] = ()

    def column(self, key: str) -> ColumnSpec:
        """The column of that key."""
        return next(column for column in self.columns if column.key == key)

    def row(self, label: str) -> RowSpec:
        """The row of that label."""
        return next(row for row in self.rows if row.label == label)


class Reader:
    """Checks plain data against what is allowed; errors say where in which file, and what was probably meant."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, where: str, problem: str) -> ConfigError:
        """An error at a place of the file."""
        return ConfigError(f"{self.path}: {where + ': ' if where else ''}{problem}")

    def load(self) -> dict[str, Any]:
        """The file's content; a key written twice is an error."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        from core.config.files import read_text

        try:
            data = OmegaConf.to_container(OmegaConf.load(io.StringIO(read_text(self.path))), resolve=False)
        except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
            raise self.error("", f"cannot be read: {str(error).strip()}") from None
        return self.mapping(data, "")

    def mapping(self, data: Any, where: str) -> dict[str, Any]:
        """`data`, if it is a mapping."""
        if not isinstance(data, dict):
            raise self.error(where, f"a mapping (key: value) is needed here, not {data!r}")
        return data

    def keys(self, data: Mapping[str, Any], where: str, allowed: Iterable[str], required: Iterable[str] = ()) -> None:
        """Refuses unknown keys and misses required ones."""
        allowed = list(allowed)
        for key in data:
            if key not in allowed:
                raise self.error(where, f"unknown key '{key}'{nearest(key, allowed)} (allowed: {', '.join(allowed)})")
        for key in required:
            if data.get(key) is None:
                raise self.error(where, f"'{key}' is missing")

    def choice(self, value: Any, where: str, allowed: Sequence[str]) -> str:
        """`value`, if it is one of the allowed words."""
        if value not in allowed:
            raise self.error(where, f"'{value}'{nearest(str(value), allowed)} (choose one of {', '.join(allowed)})")
        return value

    def text(self, value: Any, where: str) -> str:
        """`value`, if it is text (a number is taken as text)."""
        if isinstance(value, dict | list | bool) or value is None:
            raise self.error(where, f"text is needed here, not {value!r}")
        return str(value)

    def number(self, value: Any, where: str) -> float:
        """`value`, if it is a number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(where, f"a number is needed here, not {value!r}")
        return value

    def whole(self, value: Any, where: str, *, least: int = 0) -> int:
        """`value`, if it is a whole number from `least` on."""
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(where, f"a whole number from {least} on is needed here, not {value!r}")
        return value

    def list(self, value: Any, where: str) -> list[Any]:
        """`value`, if it is a list."""
        if not isinstance(value, list):
            raise self.error(where, f"a list is needed here, not {value!r}")
        return value

    def overrides(self, value: Any, where: str) -> tuple[str, ...]:
        """Hydra overrides: a list of ``key=value``."""
        items = [self.text(item, f"{where}[{i}]") for i, item in enumerate(self.list(value or [], where))]
        for index, item in enumerate(items):
            if "=" not in item and not item.startswith("~"):
                raise self.error(f"{where}[{index}]", f"'{item}' is no override (key=value)")
        return tuple(items)

    def known(self, name: str, where: str, choices: Iterable[str], what: str) -> str:
        """`name`, if it is among the choices."""
        choices = list(choices)
        if name not in choices:
            raise self.error(where, f"no {what} '{name}'{nearest(name, choices)} (there are: {', '.join(choices)})")
        return name

    def settings(self, data: Any, where: str) -> MeasureSettings:
        """``profile:``: how measured figures are taken."""
        data = self.mapping(data or {}, where)
        self.keys(data, where, ("batch", "repeats", "threads", "device"))
        for key in ("batch", "repeats", "threads"):
            if data.get(key) is not None:
                self.whole(data[key], f"{where}.{key}", least=1)
        return MeasureSettings(**{key: value for key, value in data.items() if value is not None})


def load_table(path: str | Path) -> TableSpec:
    """Reads and checks a table file.

    ::

        title: STViT-DeiT, ImageNet-1K          # required
        source: paper, Table 1                  # where the paper's figures stand
        columns:                                # required: key -> settings, in the order of printing
          macs:  {label: MACs, unit: G, better: lower, needs: none, digits: 2}
          less:  {label: MACs, unit: "%", needs: none, of: macs, relation: change}
          top1:  {label: Top-1, unit: "%", better: higher, digits: 1}
        rows:                                   # required
          - {label: DeiT-S, experiment: stvit/deit_small, paper: {macs: 4.6, top1: 79.8}}
          - label: STViT-DeiT-S
            experiment: stvit/stvit_deit_small
            overrides: [model.network.token_grid=4]
            relative_to: DeiT-S                 # base of the columns that have a relation
            section: 224 x 224                  # heading above the rows that share it
            paper: {top1: {value: 79.8, mark: note, text: Table 1}}

    Column keys:
        label, unit, better (higher | lower | none), digits.
        needs: none (computed on the spot), data (from finished runs, the default), gpu (from finished runs, or measured
            with ``measure=true`` where it is throughput, latency, ... of core.profile.figures.MEASURED).
        of: the figure's or metric's name; the column's key when left out.
        scale: multiplies our values; a unit K, M, G, T (also GMACs, ...) does so by itself for computed figures.
        relation: change (in per cent), ratio or difference to the row that ``relative_to`` names (the column's, or the
            row's own).
        mean_of: the mean of other columns; the paper's is derived where all parts are there and it gives none.
        overrides: added to every row's, e.g. one data set per column.

    Row keys:
        label, experiment (left out: only the paper has this row), overrides, section, relative_to,
        paper: column key -> a number, the paper's own words, or {value, mark, text}; mark: one of `MARKS`, or several.
        cells: column key -> {experiment, overrides}, where one column's runs are not those of the row.

    Further keys of the file: ``notes`` (lines), ``profile`` ({batch, repeats, threads, device} of measured figures).

    Raises:
        ConfigError: anything else; names file, place and nearest valid word.
    """
    reader = Reader(Path(path))
    data = reader.load()
    data.pop("demo", None)  # what core.tables.demo reads beside the table
    return read_table(reader, data)


def read_table(reader: Reader, data: Mapping[str, Any]) -> TableSpec:
    """A table from the content of its file, see `load_table`."""
    reader.keys(
        data, "", ("title", "source", "columns", "rows", "notes", "profile"), required=("title", "columns", "rows")
    )
    columns = _columns(reader, reader.mapping(data["columns"], "columns"))
    rows = _rows(reader, reader.list(data["rows"], "rows"), columns)
    return TableSpec(
        path=reader.path,
        id=table_id(reader.path),
        title=reader.text(data["title"], "title"),
        source=reader.text(data["source"], "source") if data.get("source") is not None else "",
        columns=tuple(columns.values()),
        rows=rows,
        profile=reader.settings(data.get("profile"), "profile"),
        notes=tuple(reader.text(n, f"notes[{i}]") for i, n in enumerate(reader.list(data.get("notes") or [], "notes"))),
    )


def table_id(path: Path) -> str:
    """``PAPER/NAME`` of ``PAPER/tables/NAME.yaml``."""
    return f"{path.resolve().parents[1].name}/{path.stem}"


_COLUMN_KEYS = (
    "label",
    "unit",
    "better",
    "needs",
    "digits",
    "of",
    "scale",
    "relative_to",
    "relation",
    "mean_of",
    "overrides",
)


def _columns(reader: Reader, data: Mapping[str, Any]) -> dict[str, ColumnSpec]:
    columns: dict[str, ColumnSpec] = {}
    for key, entry in data.items():
        where = f"columns.{key}"
        if key == "label":
            raise reader.error(where, "'label' is the row's own name: choose another key")
        entry = reader.mapping(entry or {}, where)
        reader.keys(entry, where, _COLUMN_KEYS)
        mean_of = [reader.text(part, f"{where}.mean_of") for part in reader.list(entry.get("mean_of") or [], where)]
        for part in mean_of:
            reader.known(part, f"{where}.mean_of", columns, "earlier column")
        relation = entry.get("relation")
        if relation is None and entry.get("relative_to") is not None:
            relation = "change"
        if mean_of and ("needs" in entry or "of" in entry):
            raise reader.error(where, "mean_of takes needs and of from its parts: leave them out")
        needs = columns[mean_of[0]].needs if mean_of else entry.get("needs", "data")
        columns[str(key)] = ColumnSpec(
            key=str(key),
            label=reader.text(entry.get("label", key), f"{where}.label"),
            unit=reader.text(entry.get("unit", ""), f"{where}.unit"),
            better=reader.choice(entry.get("better", "none"), f"{where}.better", BETTER),
            needs=reader.choice(needs, f"{where}.needs", NEEDS),
            digits=None if entry.get("digits") is None else reader.whole(entry["digits"], f"{where}.digits"),
            of=reader.text(entry.get("of", key), f"{where}.of"),
            scale=None if entry.get("scale") is None else reader.number(entry["scale"], f"{where}.scale"),
            relative_to=entry.get("relative_to"),
            relation=None if relation is None else reader.choice(relation, f"{where}.relation", RELATIONS),
            mean_of=tuple(mean_of),
            overrides=reader.overrides(entry.get("overrides"), f"{where}.overrides"),
        )
    return columns


_ROW_KEYS = ("label", "experiment", "overrides", "paper", "section", "relative_to", "cells")


def _rows(reader: Reader, data: Sequence[Any], columns: Mapping[str, ColumnSpec]) -> tuple[RowSpec, ...]:
    rows: list[RowSpec] = []
    for index, entry in enumerate(data):
        where = f"rows[{index}]"
        entry = reader.mapping(entry, where)
        reader.keys(entry, where, _ROW_KEYS, required=("label",))
        label = reader.text(entry["label"], f"{where}.label")
        where = f"rows[{index}] ({label})"
        if any(row.label == label for row in rows):
            raise reader.error(where, "an earlier row has this label: labels must differ (add a section's name to it)")
        paper = {}
        for key, figure in reader.mapping(entry.get("paper") or {}, f"{where}.paper").items():
            reader.known(str(key), f"{where}.paper", columns, "column")
            paper[str(key)] = _figure(reader, figure, f"{where}.paper.{key}")
        cells = {}
        for key, cell in reader.mapping(entry.get("cells") or {}, f"{where}.cells").items():
            reader.known(str(key), f"{where}.cells", columns, "column")
            cell = reader.mapping(cell, f"{where}.cells.{key}")
            reader.keys(cell, f"{where}.cells.{key}", ("experiment", "overrides"), required=("experiment",))
            overrides = reader.overrides(cell.get("overrides"), f"{where}.cells.{key}.overrides")
            cells[str(key)] = (reader.text(cell["experiment"], f"{where}.cells.{key}.experiment"), overrides)
        experiment = entry.get("experiment")
        overrides = reader.overrides(entry.get("overrides"), f"{where}.overrides")
        if experiment is None and overrides:
            raise reader.error(where, "overrides without an experiment change nothing")
        rows.append(
            RowSpec(
                label=label,
                experiment=None if experiment is None else reader.text(experiment, f"{where}.experiment"),
                overrides=overrides,
                paper=paper,
                section=reader.text(entry.get("section", ""), f"{where}.section"),
                relative_to=entry.get("relative_to"),
                cells=cells,
            )
        )
    _check_bases(reader, rows, columns)
    return tuple(rows)


def _check_bases(reader: Reader, rows: Sequence[RowSpec], columns: Mapping[str, ColumnSpec]) -> None:
    """Every base of a relation is a row, and every relation has a base somewhere."""
    labels = [row.label for row in rows]
    for index, row in enumerate(rows):
        if row.relative_to is not None:
            reader.known(row.relative_to, f"rows[{index}] ({row.label}).relative_to", labels, "row")
    for column in columns.values():
        where = f"columns.{column.key}"
        if column.relative_to is not None:
            reader.known(column.relative_to, f"{where}.relative_to", labels, "row")
        elif column.relation is not None and all(row.relative_to is None for row in rows):
            raise reader.error(where, f"relation: {column.relation} to what? give relative_to here or in the rows")


def _figure(reader: Reader, data: Any, where: str) -> PaperFigure:
    if not isinstance(data, dict):
        return PaperFigure(_value(reader, data, where))
    reader.keys(data, where, ("value", "mark", "text"), required=("value",))
    marks = data.get("mark") or []
    marks = marks if isinstance(marks, list) else [marks]
    for mark in marks:
        reader.choice(mark, f"{where}.mark", tuple(MARKS))
    origin = ", ".join(MARKS[mark] for mark in marks)
    text = reader.text(data["text"], f"{where}.text") if data.get("text") is not None else ""
    return PaperFigure(_value(reader, data["value"], f"{where}.value"), ": ".join(filter(None, (origin, text))))


def _value(reader: Reader, value: Any, where: str) -> int | float | str | None:
    if isinstance(value, bool | list | dict):
        raise reader.error(where, f"a number or the paper's own words are needed here, not {value!r}")
    return value
