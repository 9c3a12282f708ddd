"""A run's folder: which one it is, where a run goes on, what is written there."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from core.config.command.processes import first_decides
from core.config.files import read_json, read_yaml
from core.config.shortened import TRIAL
from core.errors import ConfigError, VitrineError, nearest

LOCK = ".lock"

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
    from core.checkpoint.latest import LATEST, newest_first

    runs = newest_first(path.parent) if path.name == LATEST and (path.is_symlink() or not path.exists()) else [path]
    for folder in filter(None, map(_with_checkpoints, runs)):
        if best:
            return _best(folder, best, _selection(folder) if selection is None else selection)
        if (found := CheckpointStore(folder / "checkpoints").newest()) is not None:
            return found
    missing = path.parent if path.name == LATEST else path
    if not missing.exists():
        near = nearest(missing.name, [p.name for p in missing.parent.iterdir()]) if missing.parent.is_dir() else ""
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
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return dict(read_yaml(folder / "config.yaml")["checkpoint"])
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


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def choose_run_dir(cfg: dict[str, Any]) -> Path:
    """A new folder for what is no training (an evaluation), or the one given; the same on every process."""

    def choose() -> str:
        with writable(None):
            return str(cfg["run_dir"] or new_folder(cfg))

    return Path(first_decides(choose))


def new_folder(cfg: dict[str, Any]) -> Path:
    """Makes a folder ``runs_dir/name/time`` that nothing else has."""
    home = Path(cfg["runs_dir"]) / cfg["name"]
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1000):
        folder = home / (stamp if number == 0 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise ConfigError(f"cannot find a free folder name in {home}")


def holds_run(folder: Path) -> bool:
    """Whether something was trained or evaluated there: checkpoints, also those of stages, or a result."""
    places = (folder, *folder.glob("stage_*"))
    return any((place / "result.json").is_file() or any(place.glob("checkpoints/step_*.pt")) for place in places)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run or stage; None where nothing was saved yet.

    Raises:
        ConfigError: there are checkpoints, and all of them are damaged.
    """
    from core.checkpoint import CheckpointStore

    store = CheckpointStore(folder / "checkpoints")
    found, steps = store.newest(), store.steps()
    if found is None and steps:
        raise ConfigError(
            f"all {len(steps)} checkpoints in {store.folder} are damaged, so that the run cannot go on: copy them "
            f"again if they were copied; otherwise remove {store.folder} to start from the first step, or give "
            "another run_dir"
        )
    return found


def result_of(folder: Path | None) -> dict[str, Any] | None:
    """The result of a run that has ended, a trial's included; None where there is none."""
    try:
        result = None if folder is None else read_json(folder / "result.json")
    except OSError:
        return None
    return result


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run; a trial (`core.config.shortened`) is none."""
    result = result_of(folder)
    return result if result is not None and result.get("status") == "finished" else None


def ended_trial(folder: Path | None) -> bool:
    """Whether a folder holds a trial (`core.config.shortened`) that has ended."""
    return (result_of(folder) or {}).get("status") == TRIAL


def read_config(folder: Path) -> dict[str, Any]:
    """The config that a run was begun with.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = folder / "config.yaml"
    try:
        content = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict) or not {"name", "seed", "model"} <= content.keys():
        raise ConfigError(f"{path} is empty or cut off")
    return content


def known_config(folder: Path | None) -> dict[str, Any] | None:
    """`read_config`, or None."""
    try:
        return None if folder is None else read_config(folder)
    except ConfigError:
        return None


def write_config(cfg: dict[str, Any]) -> None:
    """``config.yaml`` and ``overrides.txt`` in the run's folder, each in one atomic replacement.

    Raises:
        CheckpointWriteError: the disk is full, read-only, or the like.
    """
    from core.checkpoint import write_text_atomic

    folder = Path(cfg["run_dir"])
    write_text_atomic("".join(f"{o}\n" for o in cfg["overrides"]), folder / "overrides.txt")
    write_text_atomic(yaml.safe_dump(cfg, sort_keys=False), folder / "config.yaml")


def unwritable(error: OSError, folder: Path) -> bool:
    """Whether an error says that a file of a run's folder could not be written."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
    place = Path(str(error.filename or "")).absolute()
    return error.errno in full or place.is_relative_to(folder.absolute())


@contextlib.contextmanager
def writable(folder: Path | None, after: str = "") -> Iterator[None]:
    """Turns what a disk answers into one clear error.

    Args:
        folder: where it is written.
        after: what the message ends with.

    Raises:
        VitrineError: the folder (or one like it) cannot be made or written.
    """
    try:
        yield
    except VitrineError:
        raise
    except OSError as error:
        place = error.filename or folder or "the run's folder"
        raise VitrineError(
            f"cannot write {place}: {error.strerror or error}. Free some space, or give run_dir= or runs_dir= on a "
            f"disk that can be written{after}"
        ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON in one atomic replacement.

    Raises:
        CheckpointWriteError: the disk is full, read-only, or the like.
    """
    from core.checkpoint import write_text_atomic

    write_text_atomic(json.dumps(content, indent=1, default=float), path)
