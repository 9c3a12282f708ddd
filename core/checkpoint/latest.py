"""Which run of an experiment is the latest: what ``runs/PAPER/NAME/latest`` and ``checkpoint=latest`` mean.

The link leads to the run that was started last, for people and for TensorBoard. Tools take the newest run that has a
whole checkpoint: a start that failed has none. Runs of ablations and tables, and trials, are passed over by both.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.config.shortened import is_trial

LATEST = "latest"


def point_latest(cfg: dict[str, Any]) -> None:
    """Lets ``runs_dir/name/latest`` lead to a run, in one atomic step; where links cannot be made, nothing happens.

    Args:
        cfg: the run's config; only a run in ``runs_dir/name`` that a user started is pointed to.
    """
    folder = Path(cfg["run_dir"])
    home = Path(cfg["runs_dir"]) / cfg["name"]
    if not _meant(cfg) or folder.parent != home or folder.name == LATEST:
        return
    link, new = home / LATEST, home / f".{LATEST}.{os.getpid()}"
    if link.exists() and not link.is_symlink():  # somebody's own folder of that name
        return
    with contextlib.suppress(OSError, NotImplementedError):
        new.symlink_to(folder.name, target_is_directory=True)
        os.replace(new, link)
    with contextlib.suppress(OSError):
        new.unlink(missing_ok=True)


def newest_first(home: Path) -> Iterator[Path]:
    """The run folders of an experiment that a user started: the one that the link leads to, then by time of start."""
    link = home / LATEST
    runs = [p for p in home.iterdir() if p.is_dir() and not p.is_symlink()] if home.is_dir() else []
    runs.sort(key=_started, reverse=True)
    if link.is_symlink() and link.resolve() in (resolved := [p.resolve() for p in runs]):
        first = runs[resolved.index(link.resolve())]
        runs = [first, *(p for p in runs if p != first)]
    return (p for p in runs if _is_run(p))


def _started(run: Path) -> tuple[str, int]:
    """A run's time of start, and its number among those of one second (``2026-01-31_12-00-00_2``)."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?", run.name)
    return (match[1], int(match[2] or 0)) if match else ("", 0)


def _is_run(run: Path) -> bool:
    """Whether a folder is a run that a user can mean; one without a readable config is no run."""
    from core.config.files import read_yaml

    try:
        cfg = read_yaml(run / "config.yaml")
    except OSError:
        return False
    return isinstance(cfg, dict) and bool(cfg.get("model")) and _meant(cfg)


def _meant(cfg: dict[str, Any]) -> bool:
    """Whether a run was started by a user, and as a whole one."""
    return cfg.get("started_by", "train") == "train" and not is_trial(cfg.get("runtime") or {})
