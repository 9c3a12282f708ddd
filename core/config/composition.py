"""Hydra composition outside ``tools/train.py``, and the answers to misspelt overrides.

Imports Hydra only (no torch), so that ``--list`` and ``--help`` answer at once.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError, VitrineError, close_names

_OPEN = ("vars", "custom_hooks")  # mappings whose names the user chooses
#: Overrides -> config.
Compose = Callable[[list[str]], Any]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

#: What Hydra raises for overrides and config files that it cannot put together.
CANNOT_COMPOSE = (HydraException, OmegaConfBaseException, yaml.YAMLError)

# `${turn:${seed},a,b,c}` is an entry for every seed, round and round: designs spread their seeds over what they vary.
OmegaConf.register_new_resolver("turn", lambda number, *entries: entries[int(number) % len(entries)], replace=True)
# `${ratio:${vars.head},${vars.rate}}`: factors of `paramwise.multipliers` from rates that are variables of their own.
OmegaConf.register_new_resolver("ratio", lambda one, other: float(one) / float(other), replace=True)


def compose(overrides: Iterable[str], config_dir: str | Path | None = None) -> DictConfig:
    """The config of ``tools/train.py`` with these overrides, e.g. ``["experiment=stvit/digits", "seed=1"]``.

    Args:
        overrides: Hydra overrides.
        config_dir: a folder searched besides ``configs/`` (as ``--config-dir`` does).

    Raises:
        ConfigError: an unknown experiment, group, option or key; names the nearest existing ones.
    """
    overrides = [str(o) for o in overrides]
    return with_overrides(_compose(spelled_out(overrides, config_dir), config_dir, explain=True), overrides)


def composer(config_dir: str | Path | None) -> Compose:
    """`compose` with a folder of configs searched besides the project's own."""
    return lambda overrides: compose(overrides, config_dir=config_dir)


# Lengths and intervals of `train_cfg` of which a run has one: giving one takes the place of the other.
_EITHER_OR = (("max_epochs", "max_steps"), ("val_every_epochs", "val_every_steps"))
_LENGTHS = tuple(key for pair in _EITHER_OR for key in pair)


# Choices by their former names, for one version.
_FORMER = {"runtime=ddp": "runtime=bf16_compiled"}
# Where an override that adds a hook to a list waits until `with_overrides` appends it: Hydra appends to no list.
_APPENDED = "appended_hooks"


def spelled_out(overrides: Iterable[str], config_dir: str | Path | None = None) -> list[str]:
    """The overrides with ``train_cfg={max_steps: 10}`` and ``train_cfg.max_steps=10`` as ``++train_cfg.max_steps=10``.

    A run's length and its evaluations can be given in epochs or in steps whichever the experiment's file has: Hydra
    alone takes no key that the file lacks. `with_overrides` then takes the other one away.

    ``+custom_hooks.NAME={type: ...}`` stands under another key where the experiment has a list of hooks.
    """
    overrides = list(overrides)
    if _hooks_are_a_list(overrides, config_dir):
        overrides = [re.sub(r"^\+custom_hooks\.(?=[^.=]*[^.=\d][^.=]*=)", f"+{_APPENDED}.", text) for text in overrides]
    written: list[str] = []
    for text in overrides:
        if text in _FORMER:
            warnings.warn(
                f"{text} is now {_FORMER[text]}: it says precision and compilation", FutureWarning, stacklevel=3
            )
            text = _FORMER[text]
        name, equals, value = text.partition("=")
        given: Any = None
        if name == "train_cfg" and value.startswith("{"):
            with contextlib.suppress(HydraException):
                given = OverridesParser.create().parse_override(text).value()
        if isinstance(given, dict) and given and all(k in _LENGTHS and isinstance(v, int) for k, v in given.items()):
            written += [f"++train_cfg.{key}={number}" for key, number in given.items()]
        elif equals and name in [f"train_cfg.{key}" for key in _LENGTHS]:
            written.append(f"++{text}")
        else:
            written.append(text)
    return written


def _hooks_are_a_list(overrides: list[str], config_dir: str | Path | None) -> bool:
    """Whether hooks are to be added, and the config without them has a list."""
    if not any(text.startswith("+custom_hooks.") for text in overrides):
        return False
    others = [text for text in overrides if not text.startswith("+custom_hooks.")]
    try:
        chosen = {*_groups(config_dir), "custom_hooks"}
        groups = [text for text in others if text.lstrip("+~").partition("=")[0] in chosen]
        return OmegaConf.is_list(_compose(groups, config_dir, explain=False).get("custom_hooks"))
    except ConfigError:  # which is told where the whole is composed
        return False


def with_overrides(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """A composed config that knows what was given on the command line.

    ``train_cfg.max_steps=10`` takes the place of the experiment's ``max_epochs``, as if ``train_cfg.max_epochs=null``
    stood beside it, and so do the other lengths and intervals that exclude each other.
    """
    given = [re.sub(rf"^\+{_APPENDED}\.", "+custom_hooks.", str(override)) for override in overrides]
    asked: set[str] = set()
    for override in OverridesParser.create().parse_overrides(given):
        if override.is_delete():
            continue
        if override.key_or_group == "train_cfg" and isinstance(value := override.value(), dict):
            asked.update(str(key) for key, inner in value.items() if inner is not None)
        elif override.key_or_group.startswith("train_cfg.") and override.value() is not None:
            asked.add(override.key_or_group.removeprefix("train_cfg."))
    with open_dict(cfg):
        cfg.overrides = given
        if _APPENDED in cfg:
            for hook in cfg.pop(_APPENDED).values():
                cfg.custom_hooks.append(hook)
        if isinstance(cfg.get("train_cfg"), DictConfig):
            for key in displaced(cfg.train_cfg, asked):
                cfg.train_cfg[key] = None
    return cfg


def displaced(train_cfg: Any, asked: Iterable[str]) -> list[str]:
    """Keys of `train_cfg` that give way to the one that excludes them, which was asked for while they were not."""
    asked = set(asked)
    pairs = [pair for one in _EITHER_OR for pair in (one, one[::-1])]
    return [other for key, other in pairs if key in asked and other not in asked and train_cfg.get(other)]


def _compose(overrides: list[str], config_dir: str | Path | None, *, explain: bool) -> DictConfig:
    extra = [f"hydra.searchpath=[file://{folder.resolve()}]" for folder in _roots(config_dir)[1:]]
    outer = GlobalHydra.instance().hydra if GlobalHydra.instance().is_initialized() else None
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra_compose("train", overrides=[*extra, *overrides])
    # ValueError: a name where OmegaConf wants a list's index, or a file in another encoding
    except (*CANNOT_COMPOSE, ValueError, OSError, RecursionError) as error:
        hint = explain_overrides(overrides, config_dir) if explain else None
        raise ConfigError(hint or str(error).strip() or type(error).__name__) from None
    finally:
        GlobalHydra.instance().clear()
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


def broken_file(config_dir: str | Path | None) -> str | None:
    """What is wrong with the first broken file of a user's configs, whose name Hydra does not tell."""
    from core.config.files import read_yaml

    for folder in _roots(config_dir)[1:]:
        for path in sorted(folder.rglob("*.yaml")):
            try:
                content = read_yaml(path)
            except VitrineError as error:
                return str(error)
            if not isinstance(content, dict | None):
                return f"{path} holds a {type(content).__name__}, not keys and values"
    return None


def experiments(config_dir: str | Path | None = None) -> dict[str, str]:
    """Every experiment's name and its purpose: the first comment line of its file."""
    found: dict[str, str] = {}
    for root in _roots(config_dir):
        folder = root / "experiment"
        for path in sorted(folder.rglob("*.yaml")):
            found[path.relative_to(folder).with_suffix("").as_posix()] = _purpose(path)
    return found


def choices(config_dir: str | Path | None = None) -> dict[str, list[str]]:
    """Every group of configs, the inner ones apart (``experiment/stvit``), and its options."""
    found: dict[str, list[str]] = {}
    for group in sorted(_groups(config_dir)):
        for option in _options(group, config_dir):
            inner, _, name = f"{group}/{option}".rpartition("/")
            found.setdefault(inner, []).append(name)
    return found


def _purpose(path: Path) -> str:
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("@"):
            return text
        if line.strip() and not line.startswith("#"):
            break
    return ""


def explain_overrides(overrides: Iterable[str], config_dir: str | Path | None = None) -> str | None:
    """What is wrong with the first override that cannot be meant, and the nearest names; None if nothing is."""
    if (broken := broken_file(config_dir)) is not None:
        return broken
    parser = OverridesParser.create()
    groups, keys = [], []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            return _bare_word(text, config_dir)
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            return f"override '{text}' cannot be read: {str(error).splitlines()[0]}"
        if override.key_or_group.startswith("hydra"):
            continue
        if override.key_or_group in _groups(config_dir):
            groups.append((text, override))
        else:
            keys.append((text, override))
    for text, override in groups:
        options = _options(override.key_or_group, config_dir)
        value = override.value()
        if not override.is_sweep_override() and not isinstance(value, list) and value not in options:
            return f"{text}: no such {override.key_or_group}; {_closest(str(value), options)}"
    try:
        base = _compose([t for t, o in groups if not o.is_sweep_override()], config_dir, explain=False)
    except ConfigError:
        return None
    chosen = [t for t, o in groups if not o.is_sweep_override()]
    for text, override in keys:  # Hydra applies them in their order, each to what is there then
        sweep = override.is_sweep_override()
        first = next(override.sweep_string_iterator()) if sweep else None
        chosen.append(f"{override.get_key_element()}={first}" if sweep else text)
        try:
            base = _compose(chosen, config_dir, explain=False)
        except ConfigError:
            return _explained(base, text, override)
    return None


def _explained(base: DictConfig, text: str, override: Override) -> str | None:
    """What is wrong with an override that cannot be applied to a config."""
    known, plain = list(_keys(base)), OmegaConf.to_container(base)
    key = override.key_or_group
    parent, _, name = key.rpartition(".")
    if parent == "custom_hooks" and isinstance(plain["custom_hooks"], list) and not name.isdigit():
        return f"{text}: custom_hooks is a list here, which has no names; '+custom_hooks.{name}=...' adds a hook to it"
    if mismatch := _mismatch(plain, text, override):
        return mismatch
    if override.is_add() or override.is_force_add():
        return None
    for inner in [key, *(f"{key}.{inner}" for inner in _inner_keys(override.value()))]:
        if inner not in known and (key in known or inner == key):
            added = f" ('+{text}' adds one of that name)" if parent in _OPEN and not override.is_delete() else ""
            return f"{text}: the config has no key '{inner}'{added}; {_closest(inner, known)}"
    return None


def _inner_keys(value: Any, path: str = "") -> Iterator[str]:
    """Dotted names of the keys of an override's value, the inner ones too."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{path}{key}"
        yield from _inner_keys(inner, f"{path}{key}.")


def _bare_word(word: str, config_dir: str | Path | None) -> str:
    names = list(experiments(config_dir))
    close = [word] if word in names else close_names(word, names, cutoff=0.6)
    if close:
        return f"'{word}' is not KEY=VALUE; did you mean {' or '.join(f'experiment={name}' for name in close)}?"
    return f"'{word}' is not KEY=VALUE, as in experiment=stvit/digits seed=1"


def command_line(argv: list[str], config_dir: str | Path | None = None) -> tuple[list[str], list[str]]:
    """Flags and overrides of a command line; Hydra wants all overrides in one place, behind the flags.

    Raises:
        ConfigError: a flag that does not exist, or one that is meant as a key (``--seed=1``, ``--seed 1``).
    """
    parser = get_args_parser()
    flags = set(parser._option_string_actions)
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in flags:
            continue
        name = flag.lstrip("-").replace("-", "_")
        if name.partition(".")[0] in {*_compose([], None, explain=False), *_groups(config_dir)}:
            value = value if equals else next(iter(argv[index + 1 :]), "...")
            raise ConfigError(f"{flag}: keys are given without dashes: {name}={value}")
    known, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        raise ConfigError(f"there is no flag {unknown[0]}; --help names the flags, keys are given as KEY=VALUE")
    before, overrides = list(argv), [*known.overrides, *rest]
    for word in overrides:
        before.remove(word)
    overrides = spelled_out(overrides, config_dir)
    if known.cfg == "job" and any(word.startswith("++train_cfg.") for word in overrides):
        lengths = compose(overrides, config_dir).train_cfg  # what Hydra prints is what would run
        overrides += [f"++train_cfg.{key}=null" for key in _LENGTHS if key in lengths and lengths[key] is None]
    return before, overrides


def _mismatch(base: dict[str, Any], text: str, override: Override) -> str | None:
    """A list for a key that holds a mapping, or the reverse: Hydra cannot merge them."""
    key = override.key_or_group
    kinds = [
        "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else None
        for value in (get(base, key, None), override.value())
    ]
    if None in kinds or kinds[0] == kinds[1]:
        return None
    return (
        f"{text}: '{key}' holds {kinds[0]} and was given {kinds[1]}; to replace it whole, remove it first: "
        f"'~{key}' '+{text.lstrip('+')}'"
    )


def _roots(config_dir: str | Path | None) -> list[Path]:
    """The project's configs, and a user's folder of configs."""
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"there is no folder of configs '{config_dir}'")
    return [Path(root) for root in (CONFIGS, config_dir) if root]


def _groups(config_dir: str | Path | None) -> set[str]:
    return {p.name for root in _roots(config_dir) for p in root.iterdir() if p.is_dir()}


def _options(group: str, config_dir: str | Path | None) -> list[str]:
    options: list[str] = []
    for root in _roots(config_dir):
        folder = root / group
        options += [p.relative_to(folder).with_suffix("").as_posix() for p in sorted(folder.rglob("*.yaml"))]
    return options


def _closest(name: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    close = close_names(name, choices, count=3, cutoff=0.6)
    if not close:
        leaf = name.rsplit(".", 1)[-1]
        leaves = {c.rsplit(".", 1)[-1]: c for c in choices}
        close = [leaves[c] for c in close_names(leaf, leaves, count=3, cutoff=0.6)]
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(choices[:12])}"


def _keys(node: Any, path: str = "") -> Iterator[str]:
    """Dotted names of all keys, the inner ones too."""
    if OmegaConf.is_dict(node):
        for key in node:
            name = f"{path}.{key}" if path else str(key)
            yield name
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from _keys(node._get_node(key), name)
    elif OmegaConf.is_list(node) and not node._is_none():
        for index in range(len(node)):
            yield f"{path}.{index}"
            yield from _keys(node._get_node(index), f"{path}.{index}")


def to_dict(cfg: DictConfig | dict) -> dict[str, Any]:
    """The resolved config as plain containers.

    Raises:
        ConfigError: an interpolation or a mandatory value (``???``) is left open.
    """
    if not isinstance(cfg, DictConfig):
        return cfg
    given = OmegaConf.to_container(cfg["overrides"]) if cfg.get("overrides") else None
    if given:  # as they were given: `width=${vars.width}` is an override, not a value to fill in
        cfg = cfg.copy()
        with open_dict(cfg):
            cfg.overrides = []
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        return {**plain, "overrides": given} if given else plain  # type: ignore[dict-item]
    except OmegaConfBaseException as error:
        unknown = re.search(r"Interpolation key '(.+?)' not found", str(error))
        hint = f"; {_closest(unknown[1], list(_keys(cfg)))}" if unknown else ""
        raise ConfigError(f"config key '{error.full_key}': {str(error).splitlines()[0]}{hint}") from None


def get(cfg: Any, key: str, default: Any = ...) -> Any:
    """The value under a dotted key of plain containers (``"model.network.depth"``, ``"stages.0.name"``).

    Raises:
        ConfigError: the key does not exist and no default is given.
    """
    node = cfg
    for part in key.split("."):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError, ValueError):
            if default is not ...:
                return default
            raise ConfigError(f"the config has no key '{key}' ('{part}' is missing)") from None
    return node


def merge(base: Any, change: Any) -> Any:
    """`base` with `change` laid over it: mappings merge, everything else is replaced.

    A mapping whose ``type`` differs from the base's replaces it whole: arguments of one class mean nothing to another.
    """
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    if "type" in base and "type" in change and base["type"] != change["type"]:
        return change
    return {**base, **{key: merge(base.get(key), value) for key, value in change.items()}}
