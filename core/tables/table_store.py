"""``results/tables/``: the runs and measured rounds behind a table's cells, kept with the project one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config.fingerprint import fingerprint, fingerprints
from core.errors import ConfigError
from core.profile.figures import Measured
from core.tables.claim_file import is_claim
from core.tables.claim_store import ClaimStore

Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TableStore:
    """The JSON file of one table, and what else of its paper is stored: other tables and claims."""

    path: Path
    tables: tuple[Path, ...] = ()
    claims: tuple[Path, ...] = ()

    @classmethod
    def of(cls, table: Path) -> TableStore:
        """``results/tables/PAPER_NAME.json`` beside the paper's folder, for ``PAPER/tables/NAME.yaml``."""
        paper = table.resolve().parents[1]
        files = sorted(table.parent.glob("*.yaml"))
        claims = [file for file in files if is_claim(file)]

        def stored(file: Path) -> Path:
            return paper.parent / "results" / "tables" / f"{paper.name}_{file.stem}.json"

        others = tuple(stored(file) for file in files if file not in claims and file.stem != table.stem)
        return cls(stored(table), others, tuple(ClaimStore.of(file).path for file in claims))

    def read(self) -> dict[str, Any] | None:
        """The stored record; None where there is none.

        Raises:
            ConfigError: the file is damaged.
        """
        if not self.path.is_file():
            return None
        from core.config.files import check_records, read_json

        try:
            record = read_json(self.path, keys=("runs", "measured"))
            check_records(self.path, "runs", record["runs"], {"config": str, "name": str, "seed": int, "metrics": dict})
            check_records(self.path, "measured", [record], {"measured": dict})
            for name, figure in record["measured"].items():
                check_records(self.path, name, [figure], {"on": str, "rows": dict})
                check_records(self.path, name, list(figure["rows"].values()), {"config": str, "rounds": list})
            return record
        except OSError as error:
            raise ConfigError(f"{self.path} is damaged ({error}): restore it, or remove it and run again") from None

    def runs(self) -> list[dict[str, Any]]:
        """Stored runs of the whole paper; of a run that several files hold, this table's record comes first.

        Raises:
            ConfigError: a file is damaged.
        """
        records = [TableStore(path).read() for path in (self.path, *self.tables)]
        runs = [run for record in records if record for run in record["runs"]]
        return runs + [run for path in self.claims for run in ClaimStore(path).runs().values()]

    def measured(self, configs: Configs) -> tuple[dict[str, dict[str, Measured]], list[str]]:
        """This table's stored measurements whose row still has the config that was measured.

        Args:
            configs: figure -> row label -> resolved config, as it would be measured now.

        Returns:
            figure -> row label -> its rounds, and one line per figure that says what it was measured on.
        """
        found: dict[str, dict[str, Measured]] = {}
        notes = []
        for name, figure in (self.read() or {"measured": {}})["measured"].items():
            known = {label: tuple(fingerprints(cfg)) for label, cfg in configs.get(name, {}).items()}
            rows = {label: row for label, row in figure["rows"].items() if row["config"] in known.get(label, ())}
            if rows:
                found[name] = {label: Measured.of(row["rounds"]) for label, row in rows.items()}
                notes.append(f"{name}: stored, measured in turn on {figure['on']}.")
        return found, notes

    def write(
        self,
        command: str,
        runs: Iterable[Mapping[str, Any]],
        measured: Mapping[str, Mapping[str, Measured]],
        configs: Configs,
        on: str,
    ) -> None:
        """Replaces the file in one step; figures that were not measured now stay as they are stored.

        Args:
            command: what made this.
            runs: records as `core.tables.claim_store.run_record` makes them.
            measured: figure -> row label -> its rounds, measured now.
            configs: figure -> row label -> resolved config that was measured.
            on: what it was measured on.
        """
        from core.checkpoint import write_text_atomic

        figures = dict((self.read() or {"measured": {}})["measured"])
        for name, rows in measured.items():
            kept = {label: {"config": fingerprint(configs[name][label]), **asdict(v)} for label, v in rows.items()}
            figures[name] = {"on": on, "rows": kept}
        record = {"command": command, "runs": list(runs), "measured": figures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(json.dumps(record, indent=1, ensure_ascii=False) + "\n", self.path)
