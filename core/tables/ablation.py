"""`tools/ablate.py`: an experiment with one declared component changed at a time, and what each change costs.

An experiment declares its components in the paper's terms::

    components:
      pooling: {key: model.network.pool, default: weighted_offset, alternatives: [avg, max]}

The base and every alternative run with the same seeds, so the differences are paired: what a seed does to both cancels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.command.messages import first_process
from core.config.composition import Compose, composer
from core.errors import ConfigError, VitrineError, nearest
from core.output.render import Cell, Column, Row, Table, emit, plot_differences, resolve_format
from core.tables.paired import Paired, mean_and_deviation
from core.tables.runs import Launch, Results, launcher

BASE = "base"


@dataclass
class Options:
    """Options of ``tools/ablate.py``."""

    experiment: str = field(metadata={"help": "the base, e.g. stvit/digits"})
    seeds: int = field(default=3, metadata={"help": "seeds 0..N-1"})
    components: list[str] | None = field(default=None, metadata={"help": "which of the declared ones; null: all"})
    metric: list[str] | None = field(default=None, metadata={"help": "metrics to compare; null: checkpoint.metric"})
    direction: str | None = field(default=None, metadata={"help": "higher or lower is better"})
    runs_dir: str = field(default="runs", metadata={"help": "where runs are found and kept"})
    dry_run: bool = field(default=False, metadata={"help": "list the runs and stop"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs besides the project's own"})
    format: str | None = field(default=None, metadata={"help": "text, md, csv, json or png"})
    output: str | None = field(default=None, metadata={"help": "file instead of standard output"})


@dataclass(frozen=True)
class Change:
    """One alternative of one component; the base changes nothing."""

    component: str
    value: Any = None
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """How tables and plots call it."""
        return BASE if self.component == BASE else f"{self.component} = {shown(self.value)}"


@dataclass(frozen=True)
class Component:
    """A declared component: the config key, its value in the base, and what else it can be."""

    name: str
    key: str
    default: Any
    alternatives: tuple[Any, ...]

    def changes(self) -> list[Change]:
        """One change per alternative."""
        merged = self.default is not None  # nothing merges with null, and Hydra finds no null to delete
        return [Change(self.name, value, tuple(override(self.key, value, merged))) for value in self.alternatives]


def shown(value: Any) -> str:
    """A config value as one writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def override(key: str, value: Any, merged: bool = True) -> list[str]:
    """Hydra overrides that give a key exactly this value.

    A mapping replaces, where Hydra alone would have it `merged` with the mapping that is there.
    """
    if isinstance(value, Mapping | list) and merged:
        return [f"~{key}", f"+{key}={_literal(value)}"]
    return [f"{key}={_literal(value)}"]


_PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_SPECIAL_WORDS = ("null", "true", "false", "nan", "inf")


def _literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_literal(str(k))}:{_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_literal(item) for item in value) + "]"
    if not isinstance(value, str):
        return shown(value)
    if _PLAIN_WORD.fullmatch(value) and value.lower() not in _SPECIAL_WORDS:
        return value
    # A backslash counts as an escape only before a quote, so a run of them is doubled exactly there.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


# --- what is declared -----------------------------------------------------------------------------------------------


def declared(cfg: Any, chosen: Sequence[str] | None = None, overrides: Sequence[str] = ()) -> list[Component]:
    """The components of a resolved config, checked against it.

    Args:
        cfg: the base's resolved config.
        chosen: names to keep, in this order; None keeps all.
        overrides: what was given on the command line, for the message.

    Raises:
        ConfigError: nothing is declared, an unknown name or key, a default that is not the config's value, or an
            alternative that is.
    """
    from core.config.composition import to_dict

    plain = to_dict(cfg)
    entries = plain.get("components") or {}
    if not entries:
        raise ConfigError(f"{plain['name']} declares no components: there is nothing to switch off")
    for name in chosen or ():
        if name not in entries:
            raise ConfigError(
                f"{plain['name']} has no component '{name}'{nearest(name, entries)} (it has: {', '.join(entries)})"
            )
    return [_component(name, entries[name], plain, overrides) for name in (chosen or entries)]


def _component(name: str, entry: Any, plain: Mapping[str, Any], overrides: Sequence[str]) -> Component:
    from core.config.composition import get

    where = f"components.{name}"
    if not isinstance(entry, Mapping) or set(entry) != {"key", "default", "alternatives"}:
        raise ConfigError(f"{where} has to give key, default and alternatives, and nothing else")
    key, default, alternatives = entry["key"], entry["default"], entry["alternatives"]
    if not isinstance(alternatives, list) or not alternatives:
        raise ConfigError(f"{where}.alternatives has to be a list of values, not {alternatives!r}")
    try:
        value = get(plain, key)
    except ConfigError:
        raise ConfigError(f"{where}: the config has no key '{key}'{nearest(key, list(_keys(plain)))}") from None
    if not _same(value, default):
        mine = [o for o in overrides if o.lstrip("+~").partition("=")[0] == key]
        why = f"your override {mine[0]} changes it; leave it out or choose other components" if mine else "correct one"
        raise ConfigError(f"{where}: default is {shown(default)}, but {key} is {shown(value)}: {why}")
    for alternative in alternatives:
        if _same(alternative, default):
            raise ConfigError(f"{where}: the alternative {shown(alternative)} is the default itself")
    return Component(name, key, default, tuple(alternatives))


def _same(left: Any, right: Any) -> bool:
    """Equality of config values; true and 1 differ."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _keys(node: Any, path: str = "") -> Iterator[str]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{path}.{key}" if path else str(key)
        yield name
        yield from _keys(value, name)


# --- running and comparing ------------------------------------------------------------------------------------------


class Ablation:
    """The runs of an ablation and what they say.

    Args:
        options: the tool's options.
        overrides: Hydra overrides of the base and of every change.
        compose: overrides -> resolved config.
    """

    def __init__(self, options: Options, overrides: Sequence[str], compose: Compose) -> None:
        if options.seeds < 1:
            raise ConfigError(f"seeds={options.seeds}: at least one")
        if options.direction not in (None, "higher", "lower"):
            raise ConfigError(f"direction={options.direction}: higher or lower")
        self.options = options
        self._words = [f"experiment={options.experiment}", f"runs_dir={options.runs_dir}", *overrides]
        self._compose = compose
        self.seeds = list(range(options.seeds))
        self.base = compose([*self._words, "seed=0"])
        self.components = declared(self.base, options.components, overrides)
        self.changes = [Change(BASE), *(change for c in self.components for change in c.changes())]
        self.configs = {(c.label, seed): self._config(c, seed) for c in self.changes for seed in self.seeds}
        self.results: dict[tuple[str, int], Mapping[str, Any]] = {}
        self.failures: list[str] = []
        self.find_finished()

    def _config(self, change: Change, seed: int) -> Any:
        try:
            return self._compose([*self._words, *change.overrides, f"seed={seed}"])
        except ConfigError as error:
            raise ConfigError(f"{change.label}: {error}") from None

    def find_finished(self) -> None:
        """Takes up every run that is already there."""
        results = Results(self.options.runs_dir, self._compose)
        for key, cfg in self.configs.items():
            found = results.match(cfg)
            if found is not None:
                self.results[key] = found.data

    @property
    def folder(self) -> Path:
        """Where table and plot are kept."""
        return Path(self.options.runs_dir) / "ablations" / self.options.experiment

    def train(self, runner: Launch) -> None:
        """Runs what is missing, seed by seed; a run that fails is remembered and does not stop the next.

        Raises:
            core.config.command.signals.Interrupted: a run was asked to stop; calling the tool again goes on there.
            ConfigError: the first result shows that the metric has to be chosen.
        """
        from core.config.command.signals import Interrupted

        pending = sorted((k for k in self.configs if k not in self.results), key=lambda key: key[1])
        for number, (label, seed) in enumerate(pending, start=1):
            print(f"ablate: {label}, seed {seed} ({number} of {len(pending)})", file=sys.stderr, flush=True)
            try:
                self.results[label, seed] = runner(self.configs[label, seed])
            except Interrupted:
                raise
            except VitrineError as error:
                self.failures.append(f"{label}, seed {seed}: {error}")
                continue
            self.metrics()  # an unclear metric shows after the first run, not after the last

    def metrics(self) -> list[str]:
        """The metrics to compare.

        Raises:
            ConfigError: none is chosen and the runs report several, or one is chosen that they do not report.
        """

        known = dict.fromkeys(name for result in self.results.values() for name in result["metrics"])
        chosen = self.options.metric or list(_selecting(self.base))
        if not chosen:
            if len(known) > 1:
                raise ConfigError(f"several metrics: choose with metric=... (there are: {', '.join(known)})")
            return list(known)
        for name in chosen if known else ():
            if name not in known:
                raise ConfigError(f"metric={name}{nearest(name, known)} (the runs have: {', '.join(known)})")
        return list(chosen)

    def direction(self, metric: str) -> str:
        """Which way is better, as far as anybody said."""
        if self.options.direction is not None:
            return self.options.direction
        return _selecting(self.base).get(metric, "none")

    def values(self, change: Change, metric: str) -> dict[int, float]:
        """A metric by seed."""
        found = ((seed, self.results.get((change.label, seed))) for seed in self.seeds)
        return {seed: float(r["metrics"][metric]) for seed, r in found if r and metric in r["metrics"]}

    def difference(self, change: Change, metric: str) -> Paired:
        """Alternative minus base over the seeds that both have."""
        return Paired.of(self.values(change, metric), self.values(self.changes[0], metric))

    def plan(self) -> Table:
        """The runs, done and to do."""
        rows = [
            Row(
                {
                    "change": change.label,
                    "overrides": " ".join(change.overrides),
                    "done": sum((change.label, seed) in self.results for seed in self.seeds),
                    "to do": sum((change.label, seed) not in self.results for seed in self.seeds),
                }
            )
            for change in self.changes
        ]
        columns = [
            Column("change", align="left"),
            Column("overrides", align="left"),
            Column("done"),
            Column("to do"),
        ]
        return Table(f"runs of the ablation of {self.options.experiment}", columns, rows, [f"seeds: {self.seeds}"])

    def table(self) -> Table:
        """Every change with its figures and its differences to the base."""
        metrics = self.metrics()
        columns = [Column("component", align="left"), Column("value", align="left")]
        for metric in metrics:
            better = self.direction(metric)
            columns += [
                Column(metric, better=better),  # type: ignore[arg-type]
                Column(f"{metric}:difference", "difference", signed=True, group=metric),
                Column(f"{metric}:clear", "> 2 SE", align="center", group=metric),
            ]
        columns += [Column("parameters"), Column("seconds", "training", "s per run")]
        rows = [self._row(change, metrics) for change in self.changes]
        notes = [
            "metric: mean ± standard deviation over seeds (number of seeds).",
            "difference: alternative - base, paired over seeds: mean ± standard error (pairs).",
        ]
        title = f"{self.options.experiment}, one component changed at a time"
        return Table(title, columns, rows, [*notes, *(f"not trained: {f}" for f in self.failures)], name="ablation")

    def _row(self, change: Change, metrics: Sequence[str]) -> Row:
        results = [self.results[key] for key in self.configs if key[0] == change.label and key in self.results]
        base = change.component == BASE
        cells: dict[str, Any] = {
            "component": change.component,
            "value": "" if base else shown(change.value),
            "parameters": next((r["parameters"] for r in results), None),
            "seconds": mean_and_deviation([r["seconds"] for r in results])[0],
        }
        for metric in metrics:
            values = list(self.values(change, metric).values())
            mean, deviation = mean_and_deviation(values)
            cells[metric] = Cell(mean, deviation, len(values) or None)
            if base:
                continue
            pairs = self.difference(change, metric)
            cells[f"{metric}:difference"] = Cell(pairs.mean, pairs.error, pairs.count or None)
            cells[f"{metric}:clear"] = None if pairs.error is None else "yes" if pairs.clear else "no"
        return Row(cells)

    def write(self) -> list[Path]:
        """Table (Markdown, CSV, JSON) and, per metric, a plot of the differences, in `folder`."""
        table, written = self.table(), []
        for suffix in ("md", "csv", "json"):
            emit(table, suffix, self.folder / f"table.{suffix}", quiet=True)
            written.append(self.folder / f"table.{suffix}")
        changes = self.changes[1:]
        for metric in self.metrics():
            pairs = [self.difference(change, metric) for change in changes]
            written.append(
                plot_differences(
                    [change.label for change in changes],
                    [p.mean for p in pairs],
                    [p.error for p in pairs],
                    self.folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', metric)}.png",
                    title=f"{self.options.experiment}: change of {metric} (mean ± standard error, dots: seeds)",
                    unit=f"{metric}, alternative - base",
                    points=[p.differences for p in pairs],
                    better=self.direction(metric),  # type: ignore[arg-type]
                )
            )
        return written


def _selecting(cfg: Any) -> dict[str, str]:
    """The metrics that select checkpoints, if the experiment names any, and which way each is better."""
    from core.checkpoint.selection import ranking

    checkpoint = cfg.get("checkpoint") or {}
    return ranking(checkpoint.get("metric"), checkpoint.get("direction", "higher"))


def ablate(
    options: Options, overrides: Sequence[str], *, runner: Launch | None = None, compose: Compose | None = None
) -> tuple[Table, list[str]]:
    """Runs an ablation as far as it is not done, and writes its table and plot.

    Args:
        options: the tool's options.
        overrides: Hydra overrides for all runs.
        runner: resolved config -> result; `core.engine.launch.run` with ``resume=auto`` when None.
        compose: overrides -> resolved config; the project's when None.

    Returns:
        The table (of the runs to come with ``dry_run``), and one line per run that failed.
    """
    ablation = Ablation(options, overrides, compose or composer(options.config_dir))
    if options.dry_run:
        return ablation.plan(), []
    ablation.train(runner or _default_runner())
    for path in ablation.write() if first_process() else ():
        print(f"wrote {path}", file=sys.stderr)
    return ablation.table(), ablation.failures


def _default_runner() -> Callable[[Any], dict[str, Any]]:
    from core.engine.launch import run

    return launcher(run, tool="ablate")


def main(argv: list[str], doc: str) -> None:
    """``tools/ablate.py``."""
    from core.config.command.cli import parse

    options, overrides = parse(argv, Options, doc=doc, positional="experiment", overrides=True)
    format = resolve_format(options.format, options.output)
    table, failures = ablate(options, overrides)
    if first_process():
        emit(table, format, options.output)
    if failures:
        raise VitrineError("not everything could be trained:\n" + "\n".join(failures))
