"""`tools/table.py`: a paper's tables with ours beside theirs, and the papers' claims.

Figures that need no data are computed from the config; the others come from finished runs (`result.json`) whose
resolved config is that of the row. What nobody knows stays an empty cell.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.command.messages import first_process
from core.config.composition import Compose, composer
from core.config.fingerprint import fingerprint
from core.errors import ConfigError, VitrineError, nearest
from core.output.render import Cell, Column, Row, Table, emit, resolve_format
from core.profile.figures import MEASURED, Figures, Measured, measure_figures
from core.tables.claim_file import is_claim, load_claim
from core.tables.claim_store import run_record
from core.tables.paired import mean_and_deviation
from core.tables.runs import Launch, Result, Results, launcher
from core.tables.table_file import ColumnSpec, RowSpec, TableSpec, load_table, table_id
from core.tables.table_store import TableStore

SHOW = ("both", "paper", "ours")


@dataclass
class Options:
    """Options of ``tools/table.py``."""

    table: str = field(default="list", metadata={"help": "PAPER/NAME, PAPER/claim, PAPER/claim_NAME, list or claims"})
    format: str | None = field(default=None, metadata={"help": "text, md, csv, json or png"})
    output: str | None = field(default=None, metadata={"help": "file instead of standard output"})
    run: bool = field(default=False, metadata={"help": "train what is missing"})
    seeds: int | None = field(default=None, metadata={"help": "seeds 0..N-1; null: those that were run (run=true: 1)"})
    runs_dir: str = field(default="runs", metadata={"help": "where finished runs are searched and new ones go"})
    measure: bool = field(default=False, metadata={"help": "measure throughput and memory columns on this machine"})
    show: str = field(default="both", metadata={"help": "both, paper or ours"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs besides the project's own"})
    only: str | None = field(default=None, metadata={"help": "the row to train (with run=true)"})
    fresh: bool = field(default=False, metadata={"help": "stored results do not count; claims: train all again"})
    store: bool = field(
        default=False, metadata={"help": "tables: keep the runs and rounds behind the cells in results/tables"}
    )


# --- finding tables -------------------------------------------------------------------------------------------------


def find_tables(roots: Iterable[str | Path]) -> dict[str, Path]:
    """``PAPER/NAME`` -> file, for every ``PAPER/tables/NAME.yaml`` below the roots; the first root wins."""
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted(Path(root).glob("*/tables/*.yaml")):
            if not path.parts[-3].startswith("."):
                found.setdefault(table_id(path), path)
    return found


def default_roots() -> list[Path]:
    """This project, and the folder from which the tool is called (a user's own papers)."""
    from core.config.composition import CONFIGS

    return list(dict.fromkeys([CONFIGS.parent, Path.cwd()]))


def list_tables(paths: Mapping[str, Path]) -> Table:
    """All tables and claims with what they are about."""
    rows = []
    for name, path in paths.items():
        if is_claim(path):
            claim = load_claim(path)
            rows.append(Row({"table": name, "about": claim.statement, "rows": len(claim.rows)}))
            continue
        spec = load_table(path)
        needs = {column.needs for column in spec.columns}
        rows.append(
            Row(
                {
                    "table": name,
                    "about": spec.title,
                    "rows": len(spec.rows),
                    "computed": ", ".join(dict.fromkeys(c.label for c in spec.columns if c.needs == "none")),
                    "runs": "yes" if needs - {"none"} else "no",
                }
            )
        )
    columns = [
        Column("table", align="left"),
        Column("about", align="left"),
        Column("rows"),
        Column("computed", "computed on the spot", align="left"),
        Column("runs", "needs runs", align="center"),
    ]
    return Table("tables of all papers", columns, rows, ["python tools/table.py PAPER/NAME prints one."])


# --- our side of a table --------------------------------------------------------------------------------------------

# Values of one cell by seed; None stands for figures that have none.
Values = dict[int | None, float | int | str]


class Evaluation:
    """Our figures for a table.

    Args:
        spec: the table.
        compose: overrides -> resolved config.
        figures: computes data-free figures.
        results: the finished runs.
        seeds: which seeds count; None: all that were run.
        overrides: added to every row's.
        measured: figure -> row label -> measured rounds, from `measure_table`.
    """

    def __init__(
        self,
        spec: TableSpec,
        *,
        compose: Compose,
        figures: Figures,
        results: Results,
        seeds: Sequence[int] | None = None,
        overrides: Sequence[str] = (),
        measured: Mapping[str, Mapping[str, Measured]] | None = None,
    ) -> None:
        self.spec = spec
        self.notes: list[str] = []
        self._compose = compose
        self._figures = figures
        self._results = results
        self._seeds = seeds
        self._overrides = list(overrides)
        self._measured = measured or {}
        self._configs: dict[tuple[str, ...], Any] = {}
        #: Fingerprint -> run, of every run that a cell was read from.
        self.used: dict[str, Result] = {}

    def config(self, row: RowSpec, column: ColumnSpec, seed: int | None = None) -> Any | None:
        """The resolved config behind a cell; None where only the paper has the row."""
        source = row.source(column)
        if source is None:
            return None
        experiment, overrides = source
        words = [f"experiment={experiment}", *overrides, *self._overrides]
        if seed is not None:
            words.append(f"seed={seed}")
        key = tuple(words)
        if key not in self._configs:
            try:
                self._configs[key] = self._compose(words)
            except ConfigError as error:
                raise ConfigError(f"{self.spec.path}: row '{row.label}': {error}") from None
        return self._configs[key]

    def values(self, row: RowSpec, column: ColumnSpec) -> Values:
        """What we have for a cell, by seed, in the column's unit."""
        own = self._absolute(row, column)
        if column.relation is None:
            return own
        base_label = row.relative_to or column.relative_to
        if base_label is None:
            return {}
        if column.of in self._measured:
            return self._related_rounds(row.label, base_label, column)
        base = self._absolute(self.spec.row(base_label), column)
        related: Values = {}
        for seed, value in own.items():
            reference = base.get(seed)
            if isinstance(value, str) or isinstance(reference, str) or reference is None:
                continue
            if column.relation == "difference":
                related[seed] = value - reference
            elif reference != 0:
                ratio = value / reference
                related[seed] = ratio if column.relation == "ratio" else 100.0 * (ratio - 1.0)
        return related

    def _related_rounds(self, label: str, base_label: str, column: ColumnSpec) -> Values:
        """The median of the rounds' own relations: what slows the machine for a while hits both sides of a round."""
        both = [self._measured[column.of].get(one) for one in (label, base_label)]
        if None in both:
            return {}
        rounds = list(zip(*(measured.rounds for measured in both if measured), strict=True))
        if column.relation == "difference":
            return {None: self._scaled(statistics.median(ours - base for ours, base in rounds), column)}
        ratio = statistics.median(ours / base for ours, base in rounds)
        return {None: ratio if column.relation == "ratio" else 100.0 * (ratio - 1.0)}

    def _absolute(self, row: RowSpec, column: ColumnSpec) -> Values:
        if column.mean_of:
            parts = [self.values(row, self.spec.column(key)) for key in column.mean_of]
            common = [seed for seed in parts[0] if all(seed in part for part in parts)]
            numbers = {seed: [part[seed] for part in parts] for seed in common}
            return {s: statistics.fmean(n) for s, n in numbers.items() if not any(isinstance(v, str) for v in n)}
        cfg = self.config(row, column)
        if cfg is None:
            return {}
        if column.needs == "none":
            try:
                return {None: self._scaled(self._figures.of(cfg, column.of), column)}
            except ConfigError as error:
                raise ConfigError(f"{self.spec.path}: row '{row.label}', column '{column.key}': {error}") from None
        if column.of in self._measured:
            found = self._measured[column.of].get(row.label)
            return {} if found is None else {None: self._scaled(found.median, column)}
        return self._from_runs(row, column, str(cfg["name"]))

    def _from_runs(self, row: RowSpec, column: ColumnSpec, name: str) -> Values:
        values: Values = {}
        seeds = self._seeds if self._seeds is not None else self._results.seeds(name)
        for seed in seeds:
            cfg = self.config(row, column, seed)
            result = self._results.match(cfg)
            if result is not None:
                self.used[fingerprint(cfg)] = result
            if result is None:
                reason = self._results.outdated(cfg)
                if reason:
                    self._note(
                        f"{row.label}, seed {seed}: a finished run of an earlier config does not count ({reason})."
                    )
            elif column.of in result.metrics:
                values[seed] = self._scaled(result.metrics[column.of], column)
            elif column.of not in MEASURED:
                self._note(
                    f"{row.label}: its runs have no metric '{column.of}' (they have {', '.join(result.metrics)})."
                )
        return values

    def _scaled(self, value: Any, column: ColumnSpec) -> Any:
        return value if isinstance(value, str) or column.factor == 1.0 else value * column.factor

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def run_of(self, row: RowSpec, seed: int) -> Path | None:
        """The folder of the newest finished run behind a row's first cell that is fed from runs."""
        for column in self.spec.columns:
            cfg = self.config(row, column, seed) if column.needs != "none" and not column.mean_of else None
            result = None if cfg is None else self._results.match(cfg)
            if result is not None and result.path is not None:
                return result.path.parent
        return None

    def missing(self, row: RowSpec, seeds: Sequence[int]) -> list[Any]:
        """Configs that have to be trained before every run-fed cell of a row is known; no config twice."""
        wanted: dict[str, Any] = {}
        for column in self.spec.columns:
            if column.needs == "none" or column.mean_of or column.of in MEASURED:
                continue
            for seed in seeds:
                cfg = self.config(row, column, seed)
                if cfg is not None and self._results.match(cfg) is None:
                    wanted.setdefault(fingerprint(cfg), cfg)
        return list(wanted.values())

    def to_measure(self) -> dict[str, dict[str, Any]]:
        """Measured figure -> row label -> config, of the table's throughput, latency and memory columns."""
        wanted: dict[str, dict[str, Any]] = {}
        for column in self.spec.columns:
            if column.needs == "gpu" and column.of in MEASURED and not column.mean_of and column.of not in wanted:
                configs = {row.label: self.config(row, column) for row in self.spec.rows}
                wanted[column.of] = {label: cfg for label, cfg in configs.items() if cfg is not None}
        return wanted


def measure_table(evaluation: Evaluation, build_trainer: Callable[..., Any]) -> dict[str, dict[str, Measured]]:
    """Measures the table's throughput, latency and memory columns, all rows in turn in this process."""
    measured: dict[str, dict[str, Measured]] = {}
    for name, configs in evaluation.to_measure().items():
        measured |= measure_figures(configs, [name], evaluation.spec.profile, build_trainer)
    return measured


def side_by_side(evaluation: Evaluation, show: str = "both") -> Table:
    """The table with the paper's and our figures in neighbouring columns."""
    spec = evaluation.spec
    columns = [Column("label", " ", align="left")]
    for column in spec.columns:
        for side in _sides(spec, column, show):
            columns.append(
                Column(
                    f"{column.key}:{side}",
                    column.label,
                    column.unit,
                    better=column.better,  # type: ignore[arg-type]
                    digits=column.digits,
                    signed=column.relation in ("change", "difference"),
                    group=side,
                )
            )
    rows, several = [], False
    for row in spec.rows:
        cells: dict[str, Cell] = {"label": Cell(row.label)}
        for column in spec.columns:
            sides = _sides(spec, column, show)
            if "paper" in sides:
                cells[f"{column.key}:paper"] = _paper_cell(spec, row, column)
            if "ours" in sides:
                cells[f"{column.key}:ours"] = cell = _our_cell(evaluation.values(row, column))
                several |= cell.count is not None
        rows.append(Row(cells, section=row.section))
    from_paper = any(row.paper for row in spec.rows)
    notes = [f"{'Paper' if from_paper else 'Source'}: {spec.source}."] if spec.source else []
    if several:
        notes.append("Ours from runs: mean ± standard deviation over seeds (number of seeds).")
    commits = {str(one.data.get("commit") or "unknown")[:10] for one in evaluation.used.values() if one.path is None}
    if commits:
        notes.append(f"Stored runs of commit{'s' if len(commits) > 1 else ''} {', '.join(sorted(commits))}.")
    return Table(spec.title, columns, rows, [*notes, *spec.notes, *evaluation.notes], name=spec.id)


def _sides(spec: TableSpec, column: ColumnSpec, show: str) -> list[str]:
    """The paper's side appears where the paper says anything in that column."""
    said = any(not _paper_cell(spec, row, column).empty for row in spec.rows)
    return [side for side, there in (("paper", said), ("ours", True)) if there and show in ("both", side)]


def _paper_cell(spec: TableSpec, row: RowSpec, column: ColumnSpec) -> Cell:
    if column.key in row.paper:
        figure = row.paper[column.key]
        return Cell(figure.value, mark=figure.footnote)
    parts = [_paper_cell(spec, row, spec.column(key)).value for key in column.mean_of]
    if parts and all(isinstance(part, int | float) for part in parts):
        return Cell(statistics.fmean(parts), mark="mean of the paper's figures, derived here")
    return Cell()


def _our_cell(values: Values) -> Cell:
    if not values:
        return Cell()
    numbers = list(values.values())
    if None in values or any(isinstance(value, str) for value in numbers):
        return Cell(numbers[0])
    mean, deviation = mean_and_deviation([float(value) for value in numbers])
    return Cell(mean, deviation, len(numbers))


def train_missing(
    evaluation: Evaluation, seeds: Sequence[int], runner: Launch, *, only: str | None = None
) -> list[str]:
    """Trains what the table lacks, one run after the other; a row that fails does not stop the next.

    Returns:
        One line per failed run.

    Raises:
        core.config.command.signals.Interrupted: a run was asked to stop; what is finished stays finished.
        ConfigError: `only` is no row.
    """
    from core.config.command.signals import Interrupted

    labels = [row.label for row in evaluation.spec.rows]
    if only is not None and only not in labels:
        raise ConfigError(f"only={only}: no such row{nearest(only, labels)} (there are: {', '.join(labels)})")
    failures, tried = [], set()
    for row in evaluation.spec.rows:
        if only is not None and row.label != only:
            continue
        for cfg in evaluation.missing(row, seeds):
            if fingerprint(cfg) in tried:
                continue
            tried.add(fingerprint(cfg))
            print(f"table: training {row.label}, seed {cfg['seed']}", file=sys.stderr, flush=True)
            try:
                runner(cfg)
            except Interrupted:
                raise
            except VitrineError as error:
                failures.append(f"{row.label}, seed {cfg['seed']}: not trained: {error}")
    return failures


# --- the tool -------------------------------------------------------------------------------------------------------


def show_table(
    path: Path,
    options: Options,
    overrides: Sequence[str],
    *,
    compose: Compose,
    runner: Launch,
    build: Callable[..., Any],
) -> tuple[Table, list[str]]:
    """A table as the tool prints it, and what failed while training for it."""
    spec = load_table(path)
    if options.only is not None and not options.run:
        raise ConfigError("only= chooses the row to train: add run=true")
    where = [f"runs_dir={options.runs_dir}", *overrides]
    seeds = None if options.seeds is None else list(range(options.seeds))
    figures, failures = Figures(build), []
    store = TableStore.of(path)
    stored = [] if options.fresh else store.runs()

    def evaluation(**more: Any) -> Evaluation:
        results = Results(options.runs_dir, compose, stored)
        return Evaluation(spec, compose=compose, figures=figures, results=results, seeds=seeds, overrides=where, **more)

    if options.run:
        failures = train_missing(evaluation(), seeds or [0], runner, only=options.only)
    wanted = evaluation().to_measure()
    measured, notes = ({}, []) if options.fresh or not wanted else store.measured(wanted)
    now = measure_table(evaluation(), build) if options.measure and first_process() else {}
    if now:
        measured, notes = now, [f"Measured in turn on {spec.profile.where()}."]
    shown = evaluation(measured=measured)
    table = side_by_side(shown, options.show)
    table.notes = [*table.notes, *notes, *failures]
    if options.store and first_process():
        runs = [run_record(run.data, config) for config, run in shown.used.items()]
        command = shlex.join(["python", "tools/table.py", spec.id, *_given(options), *overrides])
        store.write(command, runs, now, wanted, spec.profile.where())
    return table, failures


def _given(options: Options) -> list[str]:
    """What of the options says how the cells came about, as words of a command line."""
    words = {"run": options.run, "seeds": options.seeds, "measure": options.measure, "store": True}
    return [f"{key}={str(value).lower()}" for key, value in words.items() if value]


def main(argv: list[str], doc: str) -> None:
    """``tools/table.py``."""
    from core.config.command.cli import parse

    options, overrides = parse(argv, Options, doc=doc, positional="table", overrides=True)
    format = resolve_format(options.format, options.output)
    if options.show not in SHOW:
        raise ConfigError(f"show={options.show}: choose one of {', '.join(SHOW)}")
    paths = find_tables(default_roots())
    if options.table == "list":
        emit(list_tables(paths), format, options.output)
        return
    if options.table == "claims":
        from core.tables.claims import claims_table

        emit(claims_table(paths, compose=composer(options.config_dir)), format, options.output)
        return
    from core.engine.launch import build_trainer, run

    if options.table not in paths:
        choices = ["list", "claims", *paths]
        raise ConfigError(f"no table '{options.table}'{nearest(options.table, choices)} (table.py list shows all)")
    path, compose = paths[options.table], composer(options.config_dir)
    if is_claim(path):
        from core.tables.claims import show_claim

        tables, failed = show_claim(path, options, overrides, compose=compose, runner=run, build=build_trainer)
    else:
        table, failed = show_table(path, options, overrides, compose=compose, runner=launcher(run), build=build_trainer)
        tables = [table]
    if first_process():
        emit(tables, format, options.output)
    if failed:
        raise VitrineError("not everything could be trained:\n" + "\n".join(failed))
