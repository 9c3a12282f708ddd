"""A run's folder: which one it is, where a run goes on, what is written there."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError
from core.results import fingerprint


def find_checkpoint(path: str | Path, best: bool | str = False) -> Path:
    """The newest (or best) whole checkpoint of a run's folder, or the file itself.

    With several metrics in `checkpoint.metric`, True means the first; a name means the best by that one.

    "Best" is judged by the `checkpoint.metric` and `checkpoint.direction` of the run's own config.

    Raises:
        ConfigError: there is none, or none that was judged.
    """
    path = Path(path)
    if path.is_file():
        return path
    from core.checkpoint import CheckpointStore

    stages = sorted(path.glob("stage_*"))
    folder = (stages[-1] if stages else path) / "checkpoints"
    if folder.is_dir():
        store = CheckpointStore(folder, **(_ranking(folder.parent) if best else {}))
        found = store.best(best if isinstance(best, str) else None) if best else store.newest()
        if found is not None:
            return found
        if best and store.newest() is not None:
            raise ConfigError(
                f"no checkpoint of {folder.parent} was judged: its config sets checkpoint.metric="
                f"{', '.join(store.ranking) or None} "
                "(leave best away for the newest)"
            )
    raise ConfigError(f"no checkpoint at {path}: give a checkpoint file or a run's folder")


def _ranking(run: Path) -> dict[str, Any]:
    """What a run's config says about which of its checkpoints is better."""
    config = run / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run} holds no config.yaml, which says by what metric a checkpoint is the best")
    checkpoint = (yaml.safe_load(config.read_text()) or {}).get("checkpoint") or {}
    return {key: checkpoint[key] for key in ("metric", "direction") if key in checkpoint}


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
        for folder in sorted((p.parent for p in home.glob("*/config.yaml")), key=lambda p: p.name, reverse=True):
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON in one atomic replacement."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=float))
    os.replace(partial, path)
