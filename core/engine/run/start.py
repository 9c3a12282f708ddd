"""How a run begins: in which folder, from which checkpoint, and with which config (rules: `core.engine.run.resume`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint.locks import FileLock, Locked
from core.checkpoint.run_folder import (
    LOCK,
    ended_trial,
    holds_run,
    known_config,
    new_folder,
    newest_checkpoint,
    read_config,
    result_of,
    stage_folders,
    world_size,
    writable,
    write_config,
)
from core.config.command.processes import first_decides
from core.config.fingerprint import fingerprint
from core.config.shortened import settings
from core.engine.run.resume import (
    BATCH,
    HISTORY,
    Difference,
    Origin,
    changes_figures,
    check_changes,
    check_length,
    check_very_config,
    differences,
    origin,
    stage_differences,
)
from core.errors import ConfigError


@contextlib.contextmanager
def opened(cfg: dict[str, Any]) -> Iterator[Origin | None]:
    """The run's folder, chosen alike for every process and kept from other runs meanwhile; sets ``cfg["run_dir"]``.

    Yields:
        What the run goes on from, where ``resume=`` names it.

    Raises:
        ConfigError: `resume` or `run_dir` cannot be meant, or the folder holds a run that this config does not go on
            with (see `core.engine.run.resume`).
        Locked: another process writes to the folder.
        VitrineError: the folder cannot be written.
    """
    source = origin(cfg["resume"])
    lock: FileLock | None = None

    def choose() -> str:
        nonlocal lock
        if cfg["resume_changes"] and not cfg["resume"]:
            raise ConfigError("resume_changes says what may differ in a run that goes on: give resume=RUN, too")
        folder = Path(cfg["run_dir"]) if cfg["run_dir"] else _found(cfg, source)
        with writable(folder):
            folder = folder or new_folder(cfg)
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, f"run_dir={folder}")
            try:
                lock.acquire()
            except Locked as locked:
                raise Locked(f"{locked}: wait for it, or give another run_dir", locked.holder) from None
        try:
            _check_folder({**cfg, "run_dir": str(folder)}, source)
        except BaseException:
            _leave(lock, folder)
            raise
        return str(folder)

    cfg["run_dir"] = first_decides(choose)
    if source is not None and source.is_elsewhere(Path(cfg["run_dir"])):
        cfg["forked_from"] = source.name
    try:
        yield source
    finally:
        if lock is not None:
            _leave(lock, Path(cfg["run_dir"]))


def _leave(lock: FileLock, folder: Path) -> None:
    lock.release()
    with contextlib.suppress(OSError):
        folder.rmdir()  # a start that failed before anything was written leaves no folder


def _found(cfg: dict[str, Any], source: Origin | None) -> Path | None:
    """The folder of the run to go on with, None for a new one."""
    if source is not None:
        return source.run
    if not cfg["resume"]:
        return None
    mine = fingerprint(cfg)
    home = Path(cfg["runs_dir"]) / cfg["name"]
    for path in sorted(home.glob("*/config.yaml"), key=lambda p: p.parent.name, reverse=True):
        if path.parent.is_symlink() or ended_trial(path.parent):
            continue
        try:
            if fingerprint(read_config(path.parent)) == mine:
                return path.parent
        except ConfigError as error:
            warnings.warn(f"{error}; the run is passed over", stacklevel=2)
    print(f"{cfg['name']}: no earlier run of this config in {home}, a new one begins", flush=True)
    return None


def _check_folder(cfg: dict[str, Any], source: Origin | None) -> None:
    """Holds what is in the folder, or in the one to go on from, against the config.

    Raises:
        ConfigError: see `core.engine.run.resume`.
    """
    folder = Path(cfg["run_dir"])
    begun = holds_run(folder)
    held = known_config(folder) if begun else None
    if not cfg["resume"]:
        if begun:
            raise ConfigError(
                f"{folder} already holds checkpoints or a result: resume=auto goes on, another run_dir starts anew"
            )
        return
    there = folder if source is None else source.run
    if ended_trial(there):
        keys = ", ".join(settings((known_config(there) or {}).get("runtime") or {}))
        raise ConfigError(
            f"{there} is a trial that has ended ({keys} of runtime), which does not go on: start anew without resume, "
            f"or from its weights with load_from={there}"
        )
    if source is not None and source.is_elsewhere(folder):
        if begun and (held or {}).get("forked_from") != source.name:
            raise ConfigError(
                f"run_dir={folder} holds another run than resume={cfg['resume']}: give a new run_dir to go on there, "
                "or leave run_dir out to go on where it is"
            )
        held = held or known_config(source.run)
    elif source is not None:
        held = known_config(folder)
    elif not begun:
        return
    if held is None:
        place = folder if begun else source.folder
        warnings.warn(f"{place} has no config.yaml to be read: what it holds is taken for this run", stacklevel=2)
    elif source is None:
        check_very_config(differences(held, cfg), folder)
    else:
        base = folder if begun else source.folder
        found = [d for d in differences(held, cfg) if d.key != BATCH or not _same_joint_batch(d, base)]
        check_changes(cfg, held, found, base)


def _same_joint_batch(batch: Difference, run: Path) -> bool:
    """Whether all processes together take as many samples a step as before, since there are more or fewer of them."""
    from core.checkpoint import load

    folders = stage_folders(run) or [run]
    if batch.stage is not None:
        folders = folders[batch.stage : batch.stage + 1]
    newest = [path for path in map(newest_checkpoint, folders) if path is not None]
    before = {len(load(path)["random"]) * batch.old for path in newest}
    return before == {batch.new * world_size()}


# ---------------------------------------------------------------------- where a run goes on
@dataclass(frozen=True)
class Start:
    """How a run, or one of its stages, begins.

    Attributes:
        result: of a run that has nothing left to do.
        checkpoint: where it goes on; None: at the first step.
        begun: its folder holds something that was trained or evaluated.
        changed: in what its config differs from `stored`.
        stored: the config of what it goes on from.
        fork: folder that it goes on from, where that is another one.
    """

    result: dict[str, Any] | None = None
    checkpoint: Path | None = None
    begun: bool = False
    changed: tuple[Difference, ...] = ()
    stored: dict[str, Any] | None = None
    fork: Path | None = None


def plan(cfg: dict[str, Any], source: Origin | None = None, fork: Path | None = None) -> Start:
    """How the run of a folder begins; writes nothing.

    Args:
        cfg: of the run or the stage; ``run_dir`` is its folder.
        source: what the whole run goes on from, where that is named.
        fork: folder of the run or stage that it goes on from, where that is another one.

    Raises:
        ConfigError: no checkpoint is whole, less is asked for than is done, or an older checkpoint is to be gone on
            from with another config in a folder where there are newer ones.
    """
    folder = Path(cfg["run_dir"])
    if not cfg["resume"]:
        return Start()
    begun = holds_run(folder)
    base = folder if begun or fork is None else fork
    stored = known_config(base) if holds_run(base) else None
    compare = stage_differences if cfg.get("stage_of") else differences
    changed = tuple(compare(stored, cfg)) if stored is not None else ()
    if base is folder and not changed and (result := result_of(folder)) is not None:  # or a stage of a trial
        return Start(result=result, begun=True)
    named = source.file if source is not None and source.is_of(base) else None
    checkpoint = named or newest_checkpoint(base)
    if named is not None and base is folder and changed and named.resolve() != newest_checkpoint(base).resolve():
        raise ConfigError(
            f"resume={named} with another {changed[0].name}: the run in {folder} has gone on from there, which it "
            "would contradict; give run_dir=NEW to go on in a folder of its own"
        )
    if checkpoint is not None and any(d.of_length for d in changed):
        check_length(cfg, checkpoint)
    return Start(None, checkpoint, begun, changed, stored, None if base is folder else fork)


# ---------------------------------------------------------------------- what is written
def enter(cfg: dict[str, Any], start: Start) -> dict[str, Any]:
    """Puts the config into the run's folder, once; of a run that goes on with a changed one the former stays beside it.

    Called on the first process.

    Returns:
        The config with its history: what was changed at which step.
    """
    folder = Path(cfg["run_dir"])
    history = list((start.stored or {}).get(HISTORY) or ())
    if kept := changes_figures(cfg, start.changed):
        changes = {d.name: [_plain(d.old), _plain(d.new)] for d in kept}
        history.append({"step": _step(start.checkpoint), "changes": changes})
    forked_from = cfg.get("forked_from") or (start.stored or {}).get("forked_from")
    cfg = {**cfg, "forked_from": forked_from, HISTORY: history}
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if start.fork is not None:
            for log in start.fork.glob("log.*"):
                shutil.copy2(log, folder / log.name)
        if start.begun and start.changed:
            _keep_former(folder, _step(start.checkpoint))
        if not start.begun or start.changed or known_config(folder) is None:
            write_config(cfg)
    return cfg


def _keep_former(folder: Path, step: int | None) -> None:
    """Sets the result of a run that goes on aside, so that it is not taken for finished, and copies of its config."""
    aside = folder / "earlier"
    aside.mkdir(exist_ok=True)
    mark = f"step_{step or 0:08d}"
    for name in ("config.yaml", "overrides.txt"):
        if (folder / name).is_file():
            shutil.copy2(folder / name, aside / f"{Path(name).stem}_{mark}{Path(name).suffix}")
    if (folder / "result.json").is_file():
        os.replace(folder / "result.json", aside / f"result_{mark}.json")


def _step(checkpoint: Path | None) -> int | None:
    match = re.search(r"step_(\d+)", checkpoint.stem) if checkpoint is not None else None
    return int(match[1]) if match else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
