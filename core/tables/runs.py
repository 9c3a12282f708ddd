"""Finished runs as evidence: which `result.json` below a folder belongs to which resolved config.

A run counts when `core.config.fingerprint` is the same for both, so one that was copied from a cluster does, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import shortened
from core.config.command.messages import to_stderr
from core.config.composition import Compose
from core.config.fingerprint import fingerprint, fingerprints, first_difference, relevant
from core.engine.run.sweep import contained
from core.errors import ConfigError, VitrineError

Launch = Callable[[Any], dict[str, Any]]


def launcher(run: Launch, *, resume: bool = True, tool: str = "table") -> Launch:
    """A runner for tools: goes on from an interrupted run of the same config, and keeps standard output clean.

    Whatever fails in a run is raised as one of the project's errors, so that the runs to come are not lost with it. A
    trial is, too: it is no evidence.

    Args:
        run: `core.engine.launch.run`.
        resume: False starts anew whatever there is.
        tool: who starts the runs, kept with them: they are not what a user means with ``latest``.
    """

    def call(cfg: Any) -> dict[str, Any]:
        from omegaconf import open_dict

        cfg = cfg.copy()
        with open_dict(cfg):
            cfg.resume = "auto" if resume else False
            cfg.started_by = tool
        with to_stderr():
            result = contained(run, cfg)
        if result.get("status") == shortened.TRIAL:
            keys = ", ".join(shortened.settings(cfg.runtime))
            raise VitrineError(f"a trial ran through, but is no evidence (leave {keys} of runtime out)")
        return result

    return call


@dataclass(frozen=True)
class Result:
    """One finished run: the content of its `result.json` and where that lies; None: it is known from a store alone."""

    path: Path | None
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Experiment id, e.g. ``stvit/digits``."""
        return str(self.data.get("name", ""))

    @property
    def seed(self) -> int | None:
        """The run's seed."""
        return self.data.get("seed")

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metric name -> value."""
        return self.data.get("metrics", {})

    @property
    def config(self) -> dict[str, Any] | None:
        """The resolved config stored beside the result, or None where only the result was copied, or it is damaged."""
        from core.checkpoint.run_folder import known_config

        return None if self.path is None else known_config(self.path.parent)


class Results:
    """The finished runs below a folder, asked by resolved config.

    Args:
        runs_dir: searched at any depth; it need not exist.
        compose: overrides -> config, for results whose `config.yaml` was not copied along.
        stored: records of runs whose folders are gone, each with the fingerprint of its `config`
            (`core.tables.table_store`); a run in `runs_dir` is preferred.
    """

    def __init__(self, runs_dir: str | Path, compose: Compose, stored: Iterable[Mapping[str, Any]] = ()) -> None:
        self.runs_dir = Path(runs_dir)
        self._compose = compose
        self._stored = list(stored)
        self._by_name: dict[str, list[Result]] = {}
        self._prints: dict[Path, str | None] = {}
        for result in _read_all(self.runs_dir):
            self._by_name.setdefault(result.name, []).append(result)

    def match(self, cfg: Any) -> Result | None:
        """The newest finished run of this config, seed included."""
        wanted = fingerprint(cfg)
        for result in self._candidates(cfg):
            if self._fingerprint(result) == wanted:
                return result
        known = set(fingerprints(cfg)) if self._stored else ()
        return next((Result(None, run) for run in self._stored if run["config"] in known), None)

    def seeds(self, name: str) -> list[int]:
        """Seeds with which an experiment was run, whatever the rest of the config."""
        found = {result.seed for result in self._by_name.get(name, ())}
        found |= {run["seed"] for run in self._stored if run["name"] == name}
        return sorted(seed for seed in found if seed is not None)

    def outdated(self, cfg: Any) -> str | None:
        """Why a run with these very overrides does not count: how its config differed. None where there is none."""
        for result in self._candidates(cfg):
            stored = result.config
            if stored is None:
                continue
            recomposed = self._recompose(result)
            if recomposed is not None and fingerprint(recomposed) == fingerprint(cfg):
                difference = first_difference(relevant(stored), relevant(cfg))
                if difference:
                    return difference
        return None

    def _candidates(self, cfg: Any) -> Iterable[Result]:
        return [r for r in self._by_name.get(str(cfg["name"]), ()) if r.seed == cfg["seed"]]

    def _fingerprint(self, result: Result) -> str | None:
        if result.path not in self._prints:
            config = result.config
            if config is None and not result.data.get("resume_history"):
                config = self._recompose(result)
            self._prints[result.path] = None if config is None else fingerprint(config)
        return self._prints[result.path]

    def _recompose(self, result: Result) -> Any | None:
        overrides = [str(o) for o in result.data.get("overrides") or []]
        if not any(o.startswith("experiment=") for o in overrides):
            overrides.insert(0, f"experiment={result.name}")
        overrides = [o for o in overrides if not o.startswith("seed=")]
        try:
            return self._compose([*overrides, f"seed={result.seed}"])
        except ConfigError:
            return None


def _read_all(runs_dir: Path) -> list[Result]:
    """Finished results, newest first; unreadable files are named on standard error and left out."""
    from core.config.files import read_json

    found = []
    for path in runs_dir.rglob("result.json"):
        try:
            data = read_json(path)
        except OSError as error:
            print(f"warning: it does not count, because {error}", file=sys.stderr)
            continue
        stage = path.parent.name.startswith("stage_")  # a stage is a part of a run, not a run
        if data.get("status") == "finished" and not stage:
            found.append(Result(path, data))
    # Run folders are named by their start; modification times decide between copies only.
    return sorted(found, key=lambda r: (r.path.parent.name, r.path.stat().st_mtime), reverse=True)
