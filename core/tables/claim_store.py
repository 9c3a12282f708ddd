"""``results/claims/``: a claim's evidence, kept with the project so that it outlives the runs' folders."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.tables.claim_file import CLAIM, is_claim

# What is kept of a run's result.json: figures and provenance, no place on a machine.
_KEPT = (
    "name",
    "seed",
    "metrics",
    "steps",
    "parameters",
    "trainable_parameters",
    "seconds",
    "peak_memory_mb",
    "device",
    "processes",
    "versions",
    "commit",
    "finished",
    "resumed_from",
)
_PLACES = ("runs_dir=", "run_dir=", "resume=", "seed=", "hydra.")


def run_record(result: Mapping[str, Any], config: str) -> dict[str, Any]:
    """The part of a `result.json` that a claim keeps, with the fingerprint of its config."""
    overrides = [str(o) for o in result.get("overrides") or [] if not str(o).startswith(_PLACES)]
    kept = {key: result[key] for key in _KEPT if key in result}
    if kept.get("resumed_from"):  # that the run was interrupted, and after which step; the folder says nothing
        kept["resumed_from"] = Path(kept["resumed_from"]).name
    return {"config": config, "overrides": overrides, **kept}


@dataclass(frozen=True)
class ClaimStore:
    """The JSON file of one claim, and those of the paper's other claims, whose rows may be the same runs."""

    path: Path
    others: tuple[Path, ...] = ()

    @classmethod
    def of(cls, claim: Path) -> ClaimStore:
        """``results/claims/PAPER.json`` beside the paper's folder, for ``PAPER/tables/claim.yaml``.

        ``PAPER_NAME.json`` for ``PAPER/tables/claim_NAME.yaml``.
        """
        paper = claim.resolve().parents[1]
        stems = {file.stem for file in claim.parent.glob("*.yaml") if is_claim(file)} - {claim.stem}
        own, *others = (
            paper.parent / "results" / "claims" / f"{paper.name}{stem.removeprefix(CLAIM)}.json"
            for stem in [claim.stem, *sorted(stems)]
        )
        return cls(own, tuple(others))

    def read(self) -> dict[str, Any] | None:
        """The stored record; None where there is none.

        Raises:
            ConfigError: the file is damaged.
        """
        if not self.path.is_file():
            return None
        from core.config.files import check_records, read_json

        try:
            record = read_json(self.path, keys=("definition_hash", "row_configs", "figures", "rows"))
            check_records(self.path, "rows", record["rows"], {"runs": list})
            check_records(self.path, "runs", [run for row in record["rows"] for run in row["runs"]], {"config": str})
            check_records(self.path, "figures and row_configs", [record], {"figures": dict, "row_configs": dict})
            return record
        except OSError as error:
            raise ConfigError(f"{self.path} is damaged ({error}): restore it, or remove it and run again") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Replaces the file in one step."""
        from core.checkpoint import write_text_atomic

        write_text_atomic(json.dumps(record, indent=1, ensure_ascii=False) + "\n", self.path)

    def runs(self) -> dict[str, dict[str, Any]]:
        """Stored runs by the fingerprint of their config; they stay good while that config is asked for.

        Of a run that several claims hold, this claim's record counts.

        Raises:
            ConfigError: this file or that of another claim of the paper is damaged.
        """
        records = [ClaimStore(path).read() for path in (*reversed(self.others), self.path)]
        return {run["config"]: run for record in records if record for row in record["rows"] for run in row["runs"]}

    def figures(self, definition_hash: str, row_configs: Mapping[str, Container[str]]) -> dict[str, dict[str, Any]]:
        """Stored figures that no training gives; none where the definition or any row's config has changed.

        Args:
            definition_hash: of the claim.
            row_configs: fingerprints under which each row's figures may have been stored.
        """
        record = self.read()
        if record is None or record["definition_hash"] != definition_hash:
            return {}
        stored = record["row_configs"]
        same = stored.keys() == row_configs.keys() and all(stored[row] in known for row, known in row_configs.items())
        return record["figures"] if same else {}
