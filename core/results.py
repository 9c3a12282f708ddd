"""Finished runs as evidence: which `result.json` below a folder belongs to which resolved config.

Two configs mean the same run when they agree on everything that can change the numbers: `fingerprint` leaves out where
things are stored, how the run is watched and how fast the machine is fed (see `core.influence`). A run copied from a
cluster therefore counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import shortened
from core.errors import ConfigError, VitrineError
from core.influence import WATCHING, influential, without_declared, without_defaults
from core.sweep import contained

Compose = Callable[[list[str]], Any]
Runner = Callable[[Any], dict[str, Any]]


def composer(config_dir: str | Path | None) -> Compose:
    """`core.config.compose` with a folder of configs searched besides the project's own."""
    from core.config import compose

    return lambda overrides: compose(overrides, config_dir=config_dir)


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """What runs and builders print goes to standard error: standard output belongs to the table."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def launcher(run: Runner, *, resume: bool = True, tool: str = "table") -> Runner:
    """A runner for tools: goes on from an interrupted run of the same config, and keeps standard output clean.

    Whatever fails in a run is raised as one of the project's errors, so that the runs to come are not lost with it. A
    trial is, too: it is no evidence.

    Args:
        run: `core.launch.run`.
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


# Top-level keys that say where a run is kept and how it is watched.
_BOOKKEEPING = (
    "runs_dir",
    "run_dir",
    "resume",
    "resume_changes",
    "resume_from",
    "forked_from",
    "stage_of",
    "overrides",
    "started_by",
    "components",
    "without_influence",
    "paper",
    "hydra",
    *WATCHING,
)
# Keys of `runtime` that change numbers; the others choose a device, a compiler, a wrapper.
_RUNTIME = ("precision", "debug")
# Keys of `checkpoint` that say which is best; the others say when and how many are kept.
_CHECKPOINT = ("metric", "direction")
# Keys, at any depth, that belong to the machine.
_MACHINE = frozenset(
    {"root", "data_root", "cache_dir", "num_workers", "pin_memory", "prefetch_factor", "persistent_workers"}
)


def relevant(cfg: Any) -> dict[str, Any]:
    """The part of a resolved config that can change a run's numbers, as plain containers."""
    from core.config import to_dict

    return influential(_formerly_relevant(without_declared(to_dict(cfg))))


def _formerly_relevant(cfg: Any) -> dict[str, Any]:
    """As `relevant` was when the first results were stored: hooks that only watch and the like count, too."""
    from core.config import to_dict

    plain = to_dict(cfg)
    kept = without_defaults({k: _without_machine(v) for k, v in plain.items() if k not in _BOOKKEEPING})
    if "custom_hooks" in kept:
        hooks = kept["custom_hooks"] or []  # names of hooks change no numbers
        kept["custom_hooks"] = [h for h in hooks.values() if h is not None] if isinstance(hooks, Mapping) else hooks
    if isinstance(kept.get("runtime"), Mapping):
        runtime = kept["runtime"]
        kept["runtime"] = {key: runtime[key] for key in _RUNTIME if key in runtime} | shortened.settings(runtime)
    if isinstance(kept.get("checkpoint"), Mapping):
        kept["checkpoint"] = {key: value for key, value in kept["checkpoint"].items() if key in _CHECKPOINT}
    return kept


def _without_machine(node: Any) -> Any:
    if isinstance(node, str) and node.startswith("/"):
        return node.rstrip("/").rpartition("/")[2]  # where a file lies is the machine's business, which one is ours
    if isinstance(node, Mapping):
        return {str(key): _without_machine(value) for key, value in node.items() if key not in _MACHINE}
    if isinstance(node, list | tuple):
        return [_without_machine(value) for value in node]
    return node


def fingerprint(cfg: Any) -> str:
    """Sixteen hexadecimal digits that two configs share exactly when `relevant` gives the same for both."""
    return digest(relevant(cfg))


def fingerprints(cfg: Any) -> Iterator[str]:
    """The one under which results of this config may have been stored earlier, and `fingerprint`."""
    yield digest(_formerly_relevant(cfg))
    yield fingerprint(cfg)


def digest(data: Any) -> str:
    """Sixteen hexadecimal digits of JSON-ready data; the order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_difference(left: Any, right: Any, path: str = "") -> str | None:
    """Where two plain containers first differ, e.g. ``model.network.depth: 6 there, 5 here``; None when they agree."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in [*left, *(k for k in right if k not in left)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in left or key not in right:
                return f"{inner} is only {'there' if key in left else 'here'}"
            found = first_difference(left[key], right[key], inner)
            if found:
                return found
        return None
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            found = first_difference(one, other, f"{path}.{index}")
            if found:
                return found
        return None
    return None if left == right else f"{path}: {left!r} there, {right!r} here"


@dataclass(frozen=True)
class Result:
    """One finished run: the content of its `result.json` and where that lies."""

    path: Path
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
        from core.run_folder import known_config

        return known_config(self.path.parent)


class Results:
    """The finished runs below a folder, asked by resolved config.

    Args:
        runs_dir: searched at any depth; it need not exist.
        compose: overrides -> config, for results whose `config.yaml` was not copied along.
    """

    def __init__(self, runs_dir: str | Path, compose: Compose) -> None:
        self.runs_dir = Path(runs_dir)
        self._compose = compose
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
        return None

    def seeds(self, name: str) -> list[int]:
        """Seeds with which an experiment was run, whatever the rest of the config."""
        return sorted({r.seed for r in self._by_name.get(name, ()) if r.seed is not None})

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
    from core.data.files import read_json

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
