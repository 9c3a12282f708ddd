"""A run's folder: which one it is, where a run goes on, what is written there."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError
from core.results import fingerprint

_STAGE = re.compile(r"stage_(\d+)_(.+)")


def find_checkpoint(path: str | Path, best: bool | str = False, selection: Mapping[str, Any] | None = None) -> Path:
    """The newest (or best) whole checkpoint of a run's folder, or the file itself.

    Of a run with stages it is one of the last stage that has any; of ``runs/PAPER/NAME/latest`` one of the newest run
    that has any.

    Args:
        path: a file, the folder of a run or a stage, or ``.../latest``.
        best: True: by the metric that the run was trained to select with, the first of several; or one's name.
        selection: `metric` and `direction` in place of the run's (its config's `checkpoint`).

    Raises:
        ConfigError: there is none; or the best is asked for, and no metric says which that is.
    """
    path = Path(path)
    if path.is_file():
        return path
    from core.checkpoint import CheckpointStore
    from core.latest import LATEST, newest_first
    from core.registry import nearest

    runs = newest_first(path.parent) if path.name == LATEST and (path.is_symlink() or not path.exists()) else [path]
    for folder in filter(None, map(_with_checkpoints, runs)):
        if best:
            return _best(folder, best, _selection(folder) if selection is None else selection)
        if (found := CheckpointStore(folder / "checkpoints").newest()) is not None:
            return found
    if not path.exists() and path.name != LATEST:
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ConfigError(f"no weights file {path}: there is no checkpoint at that path, nor a run's folder{near}")
    raise ConfigError(f"no whole checkpoint at {path}: give a file of weights or the folder of a run")


def _with_checkpoints(run: Path) -> Path | None:
    """The folder of the last stage that has checkpoints, or the run's own."""
    folders = [*reversed(stage_folders(run)), run]
    return next((folder for folder in folders if any(folder.glob("checkpoints/step_*.pt"))), None)


def stage_folders(run: Path) -> list[Path]:
    """The folders of a run's stages, in their order; none where it has no stages or is one itself."""
    found = [(int(match[1]), folder) for folder in run.glob("stage_*") if (match := _STAGE.fullmatch(folder.name))]
    return [folder for _, folder in sorted(found)]


def stage_of(checkpoint: Path) -> str | None:
    """The name of the stage to which a stage's folder, or a file in its ``checkpoints``, belongs."""
    for folder in (checkpoint, *checkpoint.parents[:2]):
        if match := _STAGE.fullmatch(folder.name):
            return match[2]
    return None


def _selection(folder: Path) -> Mapping[str, Any]:
    """What a run selects its best checkpoint by; nothing where its config cannot be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return dict(yaml.safe_load((folder / "config.yaml").read_text())["checkpoint"])
    return {}


def _best(folder: Path, best: bool | str, selection: Mapping[str, Any]) -> Path:
    from core.checkpoint import CheckpointStore

    metric, direction = selection.get("metric"), selection.get("direction", "higher")
    store = CheckpointStore(folder / "checkpoints", metric=metric, direction=direction)
    found = store.best(best if isinstance(best, str) else None)
    if found is not None:
        return found
    measured = sorted({name for step in store.steps() for name in store.metrics(step)})
    known = f"kept there: {', '.join(measured)}" if measured else "no figures are kept there"
    if not store.ranking:
        raise ConfigError(
            f"best: no checkpoint of {folder} was judged, as it was trained without checkpoint.metric; set "
            f"checkpoint.metric=NAME checkpoint.direction=higher|lower ({known}), or take the newest"
        )
    asked = best if isinstance(best, str) else next(iter(store.ranking))
    raise ConfigError(f"best: no whole checkpoint of {folder} was judged by its {asked} ({known})")


def rank() -> int:
    """This process's number; 0 without a process group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def choose_run_dir(cfg: dict[str, Any]) -> Path:
    """The same folder on every process."""
    import torch.distributed as dist

    chosen: list[Any] = [None]
    if rank() == 0:
        try:
            chosen = [str(_run_dir(cfg))]
        except ConfigError as error:
            chosen = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], ConfigError):
        raise chosen[0]
    return Path(chosen[0])


def _run_dir(cfg: dict[str, Any]) -> Path:
    resume = cfg["resume"]
    if cfg["run_dir"]:
        return Path(cfg["run_dir"])
    home = Path(cfg["runs_dir"]) / cfg["name"]
    if resume == "auto" or resume is True:
        mine = fingerprint(cfg)
        runs = (p.parent for p in home.glob("*/config.yaml") if not p.parent.is_symlink())
        for folder in sorted(runs, key=lambda p: p.name, reverse=True):
            if fingerprint(yaml.safe_load((folder / "config.yaml").read_text())) == mine:
                return folder
    elif resume:
        path = Path(resume)
        folder = path.parent.parent if path.is_file() else path
        if not folder.is_dir():
            raise ConfigError(f"resume={resume}: no such run folder or checkpoint")
        return folder
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1000):
        folder = home / (stamp if number == 0 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise ConfigError(f"cannot find a free folder name in {home}")


def checkpoint_to_resume(cfg: dict[str, Any]) -> Path | None:
    """Where a run goes on: the checkpoint that was named, or its folder's newest whole one."""
    resume, folder = cfg["resume"], Path(cfg["run_dir"]) / "checkpoints"
    if not resume:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"{cfg['run_dir']} already holds checkpoints: resume=auto goes on, another run_dir starts anew"
            )
        return None
    if isinstance(resume, str) and Path(resume).is_file():
        return Path(resume)
    from core.checkpoint import CheckpointStore

    return CheckpointStore(folder).newest() if folder.is_dir() else None


def finished(cfg: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run that goes on where there is nothing left to do."""
    done = Path(cfg["run_dir"]) / "result.json"
    result = json.loads(done.read_text()) if cfg["resume"] and done.is_file() else {}
    return result if result.get("status") == "finished" else None


def write_config(cfg: dict[str, Any]) -> None:
    """``config.yaml`` and ``overrides.txt`` in the run's folder."""
    folder = Path(cfg["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    (folder / "overrides.txt").write_text("".join(f"{o}\n" for o in cfg["overrides"]))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON in one atomic replacement."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=float))
    os.replace(partial, path)
