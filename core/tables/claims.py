"""A claim's evidence: runs that are found or trained, figures computed or measured, verdicts stored."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.command.messages import first_process
from core.config.composition import Compose
from core.config.fingerprint import fingerprint, fingerprints
from core.errors import ConfigError, VitrineError, nearest
from core.output.render import Column, Row, Table
from core.profile.figures import MEASURED, Figures, measure_figures
from core.tables.claim_file import OPEN, Claim, ClaimRow, Comparison, is_claim, load_claim, overall
from core.tables.claim_report import comparison_columns, comparison_record, comparison_row, rows_table, verdicts_table
from core.tables.claim_store import ClaimStore, run_record
from core.tables.paired import Paired
from core.tables.runs import Launch, Results, launcher

if TYPE_CHECKING:
    from core.tables.table import Options


class Evidence:
    """Runs and figures behind a claim: what the store holds, completed by finished runs.

    Args:
        claim: the claim.
        store: its file in ``results/claims/``.
        compose: overrides -> resolved config.
        runs_dir: where finished runs are looked for.
        overrides: added to every row's (device, threads, ...).
        fresh: labels of rows whose earlier runs and figures do not count.
    """

    def __init__(
        self,
        claim: Claim,
        store: ClaimStore,
        *,
        compose: Compose,
        runs_dir: str | Path,
        overrides: Sequence[str] = (),
        fresh: Sequence[str] = (),
    ) -> None:
        self.claim = claim
        self.store = store
        self.overrides = tuple(overrides)
        self._words = [f"runs_dir={runs_dir}", *overrides]
        self._compose = compose
        self.configs = {(r.label, seed): self._config(r, seed) for r in claim.rows for seed in claim.seeds}
        self.prints = {key: fingerprint(cfg) for key, cfg in self.configs.items()}
        self.runs: dict[tuple[str, int], dict[str, Any]] = {}
        self.figures: dict[str, dict[str, Any]] = {} if fresh else store.figures(claim.hash(), self._rows_known())
        self._collect(Results(runs_dir, compose), fresh)

    def _config(self, row: ClaimRow, seed: int) -> Any:
        try:
            return self._compose([f"experiment={row.experiment}", *row.overrides, *self._words, f"seed={seed}"])
        except ConfigError as error:
            raise ConfigError(f"{self.claim.path}: row '{row.label}': {error}") from None

    def _row_prints(self) -> dict[str, str]:
        """One fingerprint per row: figures without a seed belong to it."""
        first = self.claim.seeds[0]
        return {row.label: self.prints[row.label, first] for row in self.claim.rows}

    def _rows_known(self) -> dict[str, tuple[str, ...]]:
        """Every row's fingerprints, former ones included."""
        first = self.claim.seeds[0]
        return {row.label: tuple(fingerprints(self.configs[row.label, first])) for row in self.claim.rows}

    def _collect(self, results: Results, fresh: Sequence[str]) -> None:
        stored = self.store.runs()
        for key, print_ in self.prints.items():
            if key[0] in fresh:
                continue
            known = next((stored[name] for name in fingerprints(self.configs[key]) if name in stored), None)
            if known is not None:
                self.runs[key] = {**known, "config": print_}
            elif (result := results.match(self.configs[key])) is not None:
                self.runs[key] = run_record(result.data, print_)

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Rows and seeds that are not trained."""
        return [key for key in self.configs if key not in self.runs]

    def train(self, runner: Launch, *, only: str | None = None, save: Callable[[], Any]) -> list[str]:
        """Trains what is missing, one run after the other, and saves after each.

        Returns:
            One line per failed run.
        """
        from core.config.command.signals import Interrupted

        failures = []
        for label, seed in self.missing:
            if only is not None and label != only:
                continue
            print(f"claim {self.claim.id}: training {label}, seed {seed}", file=sys.stderr, flush=True)
            try:
                result = runner(self.configs[label, seed])
            except Interrupted:
                raise
            except VitrineError as error:
                failures.append(f"{label}, seed {seed}: {error}")
                continue
            self.runs[label, seed] = run_record(result, self.prints[label, seed])
            save()
        return failures

    def complete_figures(self, build: Callable[..., Any], *, measured: bool) -> None:
        """Computes the claim's data-free figures and, if asked, measures the others (all rows in turn).

        Raises:
            ConfigError: a name in `report` or a comparison that is neither a figure nor a metric of the runs.
        """
        computed = Figures(build)
        first = {row.label: self.configs[row.label, self.claim.seeds[0]] for row in self.claim.rows}
        for name in dict.fromkeys([*self.claim.report, *(c.metric for c in self.claim.comparisons)]):
            if name in MEASURED:
                if measured and name not in self.figures:
                    found = measure_figures(first, [name], self.claim.profile, build)[name]
                    rows = {label: asdict(value) for label, value in found.items()}
                    self.figures[name] = {"rows": rows, "on": self.claim.profile.where()}
            elif name != self.claim.metric and not any(name in run["metrics"] for run in self.runs.values()):
                try:
                    rows = {label: {"value": computed.of(cfg, name)} for label, cfg in first.items()}
                except ConfigError:
                    if self.missing:  # it may be a metric of runs that are still to come
                        continue
                    raise
                self.figures[name] = {"rows": rows}

    def values(self, label: str, name: str) -> dict[Any, float]:
        """A metric by seed, a measured figure by round, or an exact figure under None."""
        if name in self.figures:
            entry = self.figures[name]["rows"].get(label)
            if entry is None:
                return {}
            return dict(enumerate(entry["rounds"])) if "rounds" in entry else {None: entry["value"]}
        pairs = {seed: self.runs.get((label, seed)) for seed in self.claim.seeds}
        return {s: float(run["metrics"][name]) for s, run in pairs.items() if run and name in run["metrics"]}

    def verdicts(self) -> list[tuple[Comparison, Paired, str]]:
        """Every comparison judged; undecided as long as a seed is missing."""
        judged = []
        for comparison in self.claim.comparisons:
            better, than = (self.values(side, comparison.metric) for side in (comparison.better, comparison.than))
            pairs, verdict = comparison.judge(better, than)
            seeded = comparison.metric not in self.figures
            if seeded and pairs.count < len(self.claim.seeds):
                verdict = OPEN
            judged.append((comparison, pairs, verdict))
        return judged

    def record(self) -> dict[str, Any]:
        """Everything, as the claim's JSON file keeps it."""
        return {
            "claim": self.claim.id,
            "definition_hash": self.claim.hash(),
            "command": shlex.join(["python", "tools/table.py", self.claim.id, "run=true", *self.overrides]),
            "overrides": list(self.overrides),
            "holds": overall([verdict for _, _, verdict in self.verdicts()]),
            "definition": self.claim.definition(),
            "comparisons": [comparison_record(*entry) for entry in self.verdicts()],
            "rows": [
                {
                    "label": row.label,
                    "role": row.role,
                    "runs": [self.runs[row.label, s] for s in self.claim.seeds if (row.label, s) in self.runs],
                }
                for row in self.claim.rows
            ],
            "figures": self.figures,
            "row_configs": self._row_prints(),
        }


def show_claim(
    path: Path,
    options: Options,
    overrides: Sequence[str],
    *,
    compose: Compose,
    runner: Launch,
    build: Callable[..., Any],
) -> tuple[list[Table], list[str]]:
    """``tools/table.py PAPER/claim``: trains what is missing if asked, judges, and stores with ``run=true``.

    Returns:
        The tables to print, and one line per run that failed.
    """

    claim = load_claim(path)
    labels = [row.label for row in claim.rows]
    if options.only is not None and options.only not in labels:
        raise ConfigError(f"only={options.only}: no such row{nearest(options.only, labels)} (there are: {labels})")
    if options.seeds is not None:
        raise ConfigError(f"a claim's seeds are fixed in {path}: seeds= does not apply")
    store = ClaimStore.of(path)
    fresh = ([options.only] if options.only else labels) if options.fresh else []
    evidence = Evidence(claim, store, compose=compose, runs_dir=options.runs_dir, overrides=overrides, fresh=fresh)
    failures: list[str] = []
    if options.run:
        # Half of a fresh start must not replace what is stored: it is saved whole, other runs one by one.
        save = (lambda: None) if fresh or not first_process() else (lambda: store.write(evidence.record()))
        failures = evidence.train(launcher(runner, resume=not fresh), only=options.only, save=save)
    evidence.complete_figures(build, measured=(options.run or options.measure) and first_process())
    if options.run and first_process():
        store.write(evidence.record())
    return [rows_table(evidence), verdicts_table(evidence)], failures


def claims_table(paths: Mapping[str, Path], *, compose: Compose) -> Table:
    """``tools/table.py claims``: what the stored results say about every paper's claims.

    A result whose definition, or whose experiments' configs, have changed since is marked as stale.
    """
    rows = []
    for name, path in paths.items():
        if not is_claim(path):
            continue
        claim = load_claim(path)
        record = ClaimStore.of(path).read()
        section = f"{claim.paper}: {claim.statement}"
        if record is None:
            rows.append(Row({"comparison": f"not run: tools/table.py {name} run=true", "state": "missing"}, section))
            continue
        state = stale(claim, record, compose) or "current"
        for entry in record["comparisons"]:
            row = comparison_row(entry, section)
            rows.append(Row({**row.cells, "state": state}, section))
    columns = [*comparison_columns(), Column("state", align="left")]
    return Table("claims of all papers", columns, rows, ["Stored in results/claims/; run=true renews what is stale."])


def stale(claim: Claim, record: Mapping[str, Any], compose: Compose) -> str | None:
    """Why a stored record no longer speaks for the claim as it is now; None when it does."""
    if record["definition_hash"] != claim.hash():
        return f"stale: {claim.path.name} has changed since"
    for row in claim.rows:
        words = [f"experiment={row.experiment}", *row.overrides, *record["overrides"], f"seed={claim.seeds[0]}"]
        try:
            now = fingerprints(compose(words))
        except ConfigError as error:
            return f"stale: row '{row.label}' no longer composes ({error})"
        if record["row_configs"].get(row.label) not in now:
            return f"stale: the config of row '{row.label}' has changed since"
    return None
