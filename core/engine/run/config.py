"""The config of a checkpoint: its run's own with overrides laid over it, or a named experiment's; and its stage's."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from core.checkpoint.latest import LATEST
from core.checkpoint.run_folder import find_checkpoint, stage_folders, stage_of
from core.config.command.messages import first_process
from core.config.composition import CONFIGS, compose, get, to_dict
from core.config.files import read_yaml
from core.config.fingerprint import first_difference
from core.engine.keys.check import stage_config
from core.engine.run.stages import stage_files
from core.errors import ConfigError, nearest

# What a stored config says of its own run, and means nothing to another one.
_OF_THE_RUN = {"run_dir": None, "resume": False, "resume_changes": [], "overrides": []}
_LAUNCHED = ("resume_from", "stage_of", "forked_from", "resume_history")


def configured(
    checkpoint: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
    *,
    stage: str | None = None,
    best: bool | str = False,
    options: Iterable[str] = (),
) -> tuple[dict[str, Any], Path]:
    """The config and the file that a tool's command line means.

    A run's checkpoint has a config, that of its run or of its stage, and `overrides` are laid over it. An experiment
    that is named is composed in its place, and what then differs in the model is said; ``checkpoint=latest`` needs one
    to find the run, whose config it is. A bare file of weights has no config: name the experiment.

    Args:
        checkpoint: a run's folder, a stage's, a checkpoint in one, ``.../latest``, a file of weights, or ``latest``,
            the newest run of the experiment that is named.
        overrides: Hydra overrides, ``experiment=`` among them or not.
        config_dir: see `core.config.composition.compose`.
        stage: of a run or an experiment with stages, the one that is meant; None: the checkpoint's.
        best: of a run, its best checkpoint (by a metric's name) instead of the newest.
        options: names of the tool's own options, for answers to misspelt words.

    Raises:
        ConfigError: no such checkpoint, no experiment, an unknown word.
    """
    _refuse_unknown(overrides, options, config_dir)
    named = [word for word in overrides if word.lstrip("+").startswith("experiment=")]
    composed = compose(overrides, config_dir) if named else None
    path = _path(checkpoint, composed)
    if path.is_dir() and stage is not None:
        path = _stage_folder(path, stage)
    newest = find_checkpoint(path).absolute()
    folder = newest.parent.parent
    stored = stored_config(folder) if newest.parent.name == "checkpoints" else None
    if composed is None and stored is None:
        raise ConfigError(f"{newest} does not lie in a run's folder with a config.yaml: name its experiment=")
    if composed is None or (checkpoint == LATEST and stored is not None):
        cfg = laid_over(stored, [word for word in overrides if word not in named], config_dir, options)
        _say(f"config: {folder / 'config.yaml'} ({' '.join(cfg['overrides']) or cfg['name']})")
    else:
        cfg = stage_for(composed, newest, stage)
        if stored is not None:
            _tell_difference(folder, stored, cfg)
    if stage_of(newest) is not None:  # files of earlier stages lie beside this one's folder, wherever the run is now
        cfg = {**cfg, "model": stage_files(cfg["model"], folder.parent)}
    if not best or path.is_file():
        return cfg, newest
    return cfg, find_checkpoint(folder, best=best, selection=cfg["checkpoint"])


def _tell_difference(folder: Path, stored: dict[str, Any], cfg: dict[str, Any]) -> None:
    """Says where a run's model is another one than that of the experiment which was named."""
    difference = first_difference(stored["model"], cfg["model"], "model")
    if difference is not None:
        name = "" if stored.get("name") == cfg["name"] else f" ({stored.get('name')})"
        _say(
            f"warning: {folder}{name} was trained otherwise ({difference}); without experiment= its own config is used"
        )


def _say(text: str) -> None:
    if first_process():
        print(text, file=sys.stderr)


def stage_for(cfg: DictConfig | dict[str, Any], checkpoint: Path | None, stage: str | None = None) -> dict[str, Any]:
    """The resolved config of the stage to which a checkpoint belongs; of an experiment without stages, the config.

    Args:
        cfg: an experiment.
        checkpoint: a file: that of a stage says so by its folder, another one by the names and shapes in it.
        stage: the stage's name, where it is known.

    Raises:
        ConfigError: no such stage; or the file fits several.
    """

    plain = to_dict(cfg)
    stages = {str(one.get("name")): one for one in plain.get("stages") or []}
    if not stages:
        if stage is not None:
            raise ConfigError(f"stage={stage}: {plain['name']} has no stages")
        return plain
    name = stage or (stage_of(checkpoint) if checkpoint else None)
    if name is not None and name not in stages:
        raise ConfigError(
            f"{plain['name']} has no stage '{name}'{nearest(name, stages)} (stages: {', '.join(stages)}; stage= "
            "chooses one)"
        )
    configs = {one: stage_config(plain, part) for one, part in stages.items()}
    if name is None:
        name = list(stages)[-1] if checkpoint is None else _stage_by_weights(configs, checkpoint)
    chosen = configs[name]
    given = chosen["load_from"] if isinstance(chosen["load_from"], list) else [chosen["load_from"]]
    if any(isinstance(one, dict) and "stage" in one for one in given):  # an earlier stage of a run that is not here
        chosen["load_from"] = [one for one in given if not (isinstance(one, dict) and "stage" in one)] or None
    return chosen


def _stage_by_weights(configs: dict[str, dict[str, Any]], checkpoint: Path) -> str:
    """The stage whose model a file's weights are of; the last one where they are of none."""
    from core.checkpoint.placement import fits
    from core.checkpoint.weights import model_state
    from core.engine.launch import build_trainer

    state = model_state(checkpoint)
    found = [name for name, cfg in configs.items() if fits(build_trainer(cfg, "meta"), state)]
    models = [configs[name]["model"] for name in found]
    if len(found) > 1 and any(model != models[0] for model in models):
        raise ConfigError(f"{checkpoint} fits several stages: choose one with stage= ({', '.join(found)})")
    return found[-1] if found else list(configs)[-1]


def laid_over(
    stored: dict[str, Any], overrides: Sequence[str], config_dir: str | None = None, options: Iterable[str] = ()
) -> dict[str, Any]:
    """A run's resolved config with Hydra overrides laid over it: ``a.b=c``, ``+a.b=c``, ``++a.b=c``, ``~a.b``, and
    options of groups (``runtime=cpu``).

    What other keys were computed from changes alone: a resolved config has no interpolations any more.

    Args:
        stored: the content of a run's ``config.yaml``.
        overrides: without ``experiment=``.
        config_dir: see `core.config.composition.compose`.
        options: see `configured`.

    Raises:
        ConfigError: an override that cannot be read, or of a key that does not exist; near names are in the message.
    """
    groups = {path.name for root in (CONFIGS, config_dir) if root for path in Path(root).iterdir() if path.is_dir()}
    plain = {key: value for key, value in stored.items() if key not in _LAUNCHED} | _OF_THE_RUN
    if Path(str(plain.get("runs_dir"))).is_absolute() and not Path(plain["runs_dir"]).is_dir():
        plain["runs_dir"] = "runs"  # the run was copied from another machine
    chosen, keys = [], []
    for text in overrides:
        override = _parsed(text)
        (chosen if override.key_or_group in groups and isinstance(override.value(), str) else keys).append(override)
    if chosen:
        plain |= _chosen(chosen, config_dir)
    cfg = OmegaConf.create(plain)
    OmegaConf.set_struct(cfg, True)
    for override in keys:
        _lay(cfg, override, options)
    with open_dict(cfg):
        cfg.overrides = [*stored.get("overrides", []), *overrides]
    return to_dict(cfg)


def is_sweep(text: str) -> bool:
    """Whether an override gives several values, for a multirun.

    Raises:
        ConfigError: the override cannot be read.
    """
    try:
        return OverridesParser.create().parse_override(text).is_sweep_override()
    except HydraException as error:
        raise ConfigError(f"override '{text}' cannot be read: {str(error).splitlines()[0]}") from None


def _parsed(text: str) -> Override:
    if is_sweep(text):
        raise ConfigError(f"{text}: a sweep, but this tool takes one value (train.py -m runs several)")
    return OverridesParser.create().parse_override(text)


def _chosen(overrides: Sequence[Override], config_dir: str | None) -> dict[str, Any]:
    """What options of groups set, e.g. ``runtime`` of ``runtime=cpu``."""
    composed = to_dict(compose([str(override.input_line) for override in overrides], config_dir))
    keys: set[str] = set()
    for override in overrides:
        group, option = override.key_or_group, override.value()
        roots = [Path(root) / group / f"{option}.yaml" for root in (config_dir, CONFIGS) if root]
        text = next(path for path in roots if path.is_file()).read_text()
        keys |= set(yaml.safe_load(text)) if "@package _global_" in text else {group}
    return {key: composed[key] for key in keys & composed.keys()}


def _lay(cfg: DictConfig, override: Override, options: Iterable[str]) -> None:

    key, text = override.key_or_group, override.input_line
    exists = get(OmegaConf.to_container(cfg), key, _NOTHING) is not _NOTHING
    if not exists and not (override.is_add() or override.is_force_add()):
        known = [*_dotted(OmegaConf.to_container(cfg)), *options]
        raise ConfigError(f"{text}: neither the run's config nor this tool has a key '{key}'{nearest(key, known)}")
    try:
        with open_dict(cfg):
            if override.is_delete():
                parent, _, leaf = key.rpartition(".")
                node = OmegaConf.select(cfg, parent) if parent else cfg
                del node[int(leaf) if OmegaConf.is_list(node) else leaf]
            else:
                OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, TypeError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{text}: {str(error).splitlines()[0]}") from None


_NOTHING = object()


def _dotted(node: Any, path: str = "") -> Iterable[str]:
    """Dotted names of all keys of plain containers, the inner ones too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{path}.{key}" if path else str(key)
        yield name
        yield from _dotted(value, name)


def _refuse_unknown(overrides: Sequence[str], options: Iterable[str], config_dir: str | None) -> None:
    """Refuses words whose first part is neither an option of the tool, nor a key, nor a group of configs."""

    roots = [Path(root) for root in (CONFIGS, config_dir) if root]
    groups = {path.name for root in roots for path in root.iterdir() if path.is_dir()}
    keys = {*yaml.safe_load((CONFIGS / "train.yaml").read_text()), *groups, "visualizer", "log_every"} - {"defaults"}
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")[0]
        if key not in keys:
            raise ConfigError(
                f"'{word}': '{key}' is neither an option of this tool ({', '.join(options)}) nor a key of configs"
                f"{nearest(key, [*options, *keys])}"
            )


def _path(checkpoint: str, composed: DictConfig | None) -> Path:
    if checkpoint != LATEST or Path(checkpoint).exists():
        return Path(checkpoint)
    if composed is None:
        raise ConfigError("checkpoint=latest is the newest run of an experiment: name it with experiment=")
    return Path(composed.runs_dir) / composed.name / LATEST


def _stage_folder(path: Path, stage: str) -> Path:
    run = find_checkpoint(path).parents[1] if path.name == LATEST else path
    run = run.parent if stage_of(run) else run
    folders = {stage_of(folder): folder for folder in stage_folders(run)}
    if stage not in folders:
        raise ConfigError(f"stage={stage}: {run} has no such stage ({', '.join(map(str, folders)) or 'it has none'})")
    return folders[stage]


def stored_config(folder: Path) -> dict[str, Any] | None:
    """The config of a run or a stage; None where there is none that can be read."""
    try:
        cfg = read_yaml(folder / "config.yaml")
    except OSError:
        return None
    return cfg if isinstance(cfg, dict) and cfg.get("model") else None
