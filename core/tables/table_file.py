"""A paper's table as data: the YAML file, checked word by word.

See `load_table` for the format. Every error names the file, the place in it and the nearest valid word.
"""

from __future__ import annotations

import io
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from core.config.kinds import Range, Whole
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
#: Hydra overrides, ``key=value`` or ``~key``, as a field of a schema.
Overrides = Annotated[tuple[str, ...], "overrides"]
S = TypeVar("S")

_PREFIXES = {"K": 1e-3, "M": 1e-6, "G": 1e-9, "T": 1e-12}


@dataclass(frozen=True)
class PaperFigure:
    """What the paper says: a number or its own words, with the marks of its origin."""

    value: int | float | str | None
    footnote: str = ""

    @classmethod
    def read(cls, reader: Reader, data: Any, where: str) -> PaperFigure:
        """From a number, the paper's own words, or ``{value, mark, text}``."""
        if not isinstance(data, dict):
            return cls(_figure(reader, data, where))
        reader.keys(data, where, ("value", "mark", "text"), required=("value",))
        marks = data.get("mark") or []
        marks = marks if isinstance(marks, list) else [marks]
        origin = ", ".join(MARKS[reader.choice(mark, f"{where}.mark", tuple(MARKS))] for mark in marks)
        text = reader.value(data.get("text") or "", str, f"{where}.text")
        return cls(_figure(reader, data["value"], f"{where}.value"), ": ".join(filter(None, (origin, text))))


@dataclass(frozen=True)
class ColumnSpec:
    """A column of a table file; see `load_table`."""

    key: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower", "none"] = "none"
    needs: Literal["none", "data", "gpu"] = "data"
    digits: Whole | None = None
    of: str = ""
    scale: float | None = None
    relative_to: str | None = None
    relation: Literal["change", "ratio", "difference"] | None = None
    mean_of: tuple[str, ...] = ()
    overrides: Overrides = ()

    @property
    def factor(self) -> float:
        """What a computed or stored value is multiplied with to be in the column's unit."""
        if self.scale is not None:
            return self.scale
        first = self.unit.split(" ")[0].removesuffix("MACs").removesuffix("FLOPs")
        return _PREFIXES.get(first, 1.0) if self.needs == "none" else 1.0


@dataclass(frozen=True)
class CellSpec:
    """Experiment and overrides behind a cell that is not fed by its row's."""

    experiment: str
    overrides: Overrides = ()


@dataclass(frozen=True)
class RowSpec:
    """A row of a table file; see `load_table`."""

    label: str
    experiment: str | None = None
    overrides: Overrides = ()
    paper: Mapping[str, PaperFigure] = field(default_factory=dict)
    section: str = ""
    relative_to: str | None = None
    cells: Mapping[str, CellSpec] = field(default_factory=dict)

    def source(self, column: ColumnSpec) -> tuple[str, tuple[str, ...]] | None:
        """Experiment and overrides behind this row's cell of a column; None where only the paper has the row."""
        behind = self.cells.get(column.key, self)
        return None if behind.experiment is None else (behind.experiment, (*behind.overrides, *column.overrides))


@dataclass(frozen=True)
class TableSpec:
    """A whole table file."""

    path: Path
    id: str
    title: str
    columns: tuple[ColumnSpec, ...]
    rows: tuple[RowSpec, ...]
    source: str = ""
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

    def known(self, name: str, where: str, choices: Iterable[str], what: str) -> str:
        """`name`, if it is among the choices."""
        choices = list(choices)
        if name not in choices:
            raise self.error(where, f"no {what} '{name}'{nearest(name, choices)} (there are: {', '.join(choices)})")
        return name

    def fill(self, schema: type[S], data: Any, where: str, **given: Any) -> S:
        """A dataclass of a mapping whose keys are its fields; those without a default have to be there.

        Args:
            schema: the dataclass; the hint of a field says what suits its key.
            data: the mapping.
            where: its place in the file.
            given: fields that are not read from the file.
        """
        data = self.mapping(data, where)
        hints = typing.get_type_hints(schema, include_extras=True)
        read = {f.name: f for f in fields(schema) if f.name not in given}
        required = [name for name, f in read.items() if f.default is MISSING and f.default_factory is MISSING]
        self.keys(data, where, read, required)
        dot = f"{where}." if where else ""
        values = {k: self.value(data[k], hints[k], f"{dot}{k}") for k in read if data.get(k) is not None}
        return schema(**values, **given)

    def value(self, value: Any, hint: Any, where: str) -> Any:
        """`value`, if it suits a field's hint, in the form that the field has."""
        inner = typing.get_args(hint)
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):  # with None, which means that the key is left out
            return self.value(value, inner[0], where)
        if hint is Any:
            return value
        if hint == Overrides:
            return self._overrides(value, where)
        if origin is Literal:
            return self.choice(value, where, inner)
        if origin is tuple:
            if inner[0] is str and isinstance(value, str):
                value = [value]  # a single line
            if not isinstance(value, list):
                raise self.error(where, f"a list is needed here, not {value!r}")
            return tuple(self.value(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value))
        if origin is Mapping:
            return {str(k): self.value(v, inner[1], f"{where}.{k}") for k, v in self.mapping(value, where).items()}
        if hasattr(hint, "read"):
            return hint.read(self, value, where)
        if is_dataclass(hint):
            return self.fill(hint, value, where)
        return self._plain(value, hint, where)

    def _plain(self, value: Any, hint: Any, where: str) -> Any:
        bounds = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Range)), None)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if bounds is not None:
            if not number or not isinstance(value, int) or value < bounds.low:
                raise self.error(where, f"a whole number from {bounds.low} on is needed here, not {value!r}")
        elif hint is float:
            if not number:
                raise self.error(where, f"a number is needed here, not {value!r}")
        elif isinstance(value, dict | list | bool) or value is None:
            raise self.error(where, f"text is needed here, not {value!r}")
        return str(value) if hint is str else value

    def _overrides(self, value: Any, where: str) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise self.error(where, f"a list is needed here, not {value!r}")
        items = self.value(value, tuple[str, ...], where)
        for index, item in enumerate(items):
            if "=" not in item and not item.startswith("~"):
                raise self.error(f"{where}[{index}]", f"'{item}' is no override (key=value)")
        return items


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
    keys = ("title", "source", "columns", "rows", "notes", "profile")
    reader.keys(data, "", keys, required=("title", "columns", "rows"))
    columns = _columns(reader, reader.mapping(data["columns"], "columns"))
    rows = _rows(reader, data["rows"], columns)
    rest = {key: value for key, value in data.items() if key not in ("columns", "rows")}
    place = {"path": reader.path, "id": table_id(reader.path)}
    return reader.fill(TableSpec, rest, "", columns=tuple(columns.values()), rows=rows, **place)


def table_id(path: Path) -> str:
    """``PAPER/NAME`` of ``PAPER/tables/NAME.yaml``."""
    return f"{path.resolve().parents[1].name}/{path.stem}"


def _columns(reader: Reader, data: Mapping[str, Any]) -> dict[str, ColumnSpec]:
    columns: dict[str, ColumnSpec] = {}
    for key, entry in data.items():
        where = f"columns.{key}"
        if key == "label":
            raise reader.error(where, "'label' is the row's own name: choose another key")
        entry = reader.mapping(entry or {}, where)
        column = reader.fill(ColumnSpec, {"label": key, "of": key, **entry}, where, key=str(key))
        for part in column.mean_of:
            reader.known(part, f"{where}.mean_of", columns, "earlier column")
        if column.relation is None and column.relative_to is not None:
            column = replace(column, relation="change")
        if column.mean_of:
            if "needs" in entry or "of" in entry:
                raise reader.error(where, "mean_of takes needs and of from its parts: leave them out")
            column = replace(column, needs=columns[column.mean_of[0]].needs)
        columns[column.key] = column
    return columns


def _rows(reader: Reader, data: Any, columns: Mapping[str, ColumnSpec]) -> tuple[RowSpec, ...]:
    rows: list[RowSpec] = []
    if not isinstance(data, list):
        raise reader.error("rows", f"a list is needed here, not {data!r}")
    for index, entry in enumerate(data):
        label = entry.get("label") if isinstance(entry, dict) else None
        where = f"rows[{index}]" + ("" if label is None else f" ({label})")
        for key in ("paper", "cells") if isinstance(entry, dict) else ():
            for name in reader.mapping(entry.get(key) or {}, f"{where}.{key}"):
                reader.known(str(name), f"{where}.{key}", columns, "column")
        row = reader.fill(RowSpec, entry, where)
        if any(other.label == row.label for other in rows):
            raise reader.error(where, "an earlier row has this label: labels must differ (add a section's name to it)")
        if row.experiment is None and row.overrides:
            raise reader.error(where, "overrides without an experiment change nothing")
        rows.append(row)
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


def _figure(reader: Reader, value: Any, where: str) -> int | float | str | None:
    if isinstance(value, bool | list | dict):
        raise reader.error(where, f"a number or the paper's own words are needed here, not {value!r}")
    return value
