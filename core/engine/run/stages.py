"""Experiments of several stages: their folders, what each of them starts from, and how they go on together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.checkpoint.run_folder import LOCK, find_checkpoint, finished, holds_run, known_config
from core.engine.keys.check import stage_config
from core.engine.run.resume import Origin, differences, stage_differences
from core.engine.run.start import Start, enter, plan
from core.errors import ConfigError


def stage_configs(cfg: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The config of every stage by its name, each with a folder below the run's.

    Raises:
        ConfigError: a stage has no name, or two have the same one.
    """
    names = [stage.get("name") for stage in cfg["stages"]]
    if None in names or len(set(names)) != len(names):
        raise ConfigError(f"stages need distinct names, not {names}")
    found = {}
    for index, (name, stage) in enumerate(zip(names, cfg["stages"], strict=True)):
        folder = Path(cfg["run_dir"]) / f"stage_{index}_{name}"
        found[name] = {**stage_config(cfg, stage), "run_dir": str(folder), "stage_of": cfg["run_dir"]}
    return found


def with_files(cfg: dict[str, Any]) -> dict[str, Any]:
    """A stage's config whose model names files of earlier stages by their paths: ``{stage: NAME, file: FILE}``.

    The folders are looked for beside the stage's own, so that a copied run is whole. A file that is not there yet keeps
    its name: a later stage is built before earlier ones have run, to see that it can be.
    """
    if not cfg.get("stage_of") or not cfg.get("model"):
        return cfg
    return {**cfg, "model": stage_files(cfg["model"], Path(cfg["run_dir"]).parent)}


def stage_files(value: Any, folder: Path) -> Any:
    """A part of a config with ``{stage: NAME, file: FILE}`` as paths of the files that are there in a run's folder."""
    if isinstance(value, Mapping):
        if value.keys() == {"stage", "file"}:
            found = sorted(folder.glob(f"stage_*_{value['stage']}/{value['file']}"))
            return str(found[0]) if found else value
        return {key: stage_files(inner, folder) for key, inner in value.items()}
    return [stage_files(inner, folder) for inner in value] if isinstance(value, list) else value


def from_stage(load_from: Any, earlier: Mapping[str, str], *, goes_on: bool) -> Any:
    """``load_from`` with the checkpoints of earlier stages in place of their names.

    Args:
        load_from: as in the config.
        earlier: folders of the stages before, by name.
        goes_on: the stage has a checkpoint of its own, and can do without one that is gone.

    Raises:
        ConfigError: there is no such stage, or it has no checkpoint.
    """
    if isinstance(load_from, list):
        return [from_stage(one, earlier, goes_on=goes_on) for one in load_from]
    if not isinstance(load_from, dict) or "stage" not in load_from:
        return load_from
    name = load_from["stage"]
    if name not in earlier:
        raise ConfigError(f"load_from.stage '{name}' is no earlier stage ({', '.join(earlier) or 'there is none'})")
    options = {k: v for k, v in load_from.items() if k not in ("stage", "best")}
    try:
        return {"path": str(find_checkpoint(earlier[name], best=load_from.get("best", False))), **options}
    except ConfigError:
        if not goes_on:
            raise
        return {"path": str(Path(earlier[name]) / "checkpoints"), **options}  # the runner says that it goes on without


def dependents(stages: Mapping[str, dict[str, Any]], name: str) -> list[str]:
    """Stages that start from this one's weights, or from those of one that does."""
    found = {name}
    for other, cfg in stages.items():
        sources = cfg["load_from"] if isinstance(cfg["load_from"], list) else [cfg["load_from"]]
        if any(isinstance(source, Mapping) and source.get("stage") in found for source in sources):
            found.add(other)
    return [other for other in stages if other in found and other != name]


def plan_stages(
    cfg: dict[str, Any], stages: Mapping[str, dict[str, Any]], source: Origin | None
) -> tuple[dict[str, Path], dict[str, Start]]:
    """How every stage begins, were it its turn now; writes the run's config. Called on the first process.

    Args:
        cfg: of the whole run.
        stages: see `stage_configs`.
        source: what the run goes on from, where that is named.

    Returns:
        Folders of the stages that go on from another run, and the starts of all, by the stages' names.

    Raises:
        ConfigError: see `core.engine.run.start.plan`; a stage is to change from whose weights another one has
            started.
    """
    folder = Path(cfg["run_dir"])
    forked = source is not None and source.is_elsewhere(folder)
    places, done = _forks(stages, source) if forked else ({}, {})
    plans = {name: plan(staged, source, places.get(name)) for name, staged in stages.items()}
    _check_dependents(stages, plans)
    if not cfg["resume"]:
        whole = Start()
    else:
        begun = holds_run(folder)
        stored = known_config(folder) if begun else known_config(source.run) if forked else None
        changed = () if stored is None else tuple(differences(stored, cfg))
        whole = Start(begun=begun, changed=changed, stored=stored)
    enter(cfg, whole)
    for name, there in done.items():
        _copy(there, Path(stages[name]["run_dir"]))
        plans[name] = plan(stages[name])
    return places, plans


def _forks(stages: Mapping[str, dict[str, Any]], source: Origin) -> tuple[dict[str, Path], dict[str, Path]]:
    """Stages' folders in another run: of those that go on from there, and of those that are done.

    A stage that starts from the weights of one that goes on is in neither: it starts anew.
    """
    places: dict[str, Path] = {}
    done: dict[str, Path] = {}
    anew: set[str] = set()
    for name, cfg in stages.items():
        folder = Path(cfg["run_dir"])
        there = source.folder / folder.name
        stored = known_config(there)
        changed = [] if stored is None else stage_differences(stored, cfg)
        whole = finished(there) is not None and not changed and not source.is_of(there)
        if name not in anew and holds_run(there) and not holds_run(folder):
            (done if whole else places)[name] = there
        if name in anew or any(not d.of_evaluation for d in changed):
            anew.update(dependents(stages, name))
    return places, done


def _copy(there: Path, folder: Path) -> None:
    """A finished stage: what later ones and the result read of it."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(there, partial, ignore=shutil.ignore_patterns(LOCK, "media", "debug", "earlier", "events.out.*"))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _check_dependents(stages: Mapping[str, dict[str, Any]], plans: Mapping[str, Start]) -> None:
    for name, start in plans.items():
        changed = [d for d in start.changed if not d.of_evaluation]
        late = [other for other in dependents(stages, name) if plans[other].begun]
        if start.begun and changed and late:
            run = stages[name]["stage_of"]
            raise ConfigError(
                f"stage '{name}' is to go on with another {changed[0].key} ({changed[0].old!r} before, "
                f"{changed[0].new!r} now), but '{late[0]}' has started from its weights: give run_dir=NEW "
                f"resume={run}, where {', '.join(late)} will start anew and {run} stays as it is"
            )
