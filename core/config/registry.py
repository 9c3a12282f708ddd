"""Names in configs -> Python objects.

Every registry is a child (scope ``vitrine``) of mmengine's registry of the same kind, so objects registered here are
visible to OpenMMLab code and the other way round. Most configs need no registration at all: a dotted
``type: stvit.SemanticTokenViT`` is an import path. Its root package is imported on demand, so that an ImportError
inside that package is shown as what it is, and a misspelt name is answered with the nearest existing ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mmengine.registry as root
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope, Registry

from core.config.installed import check_mmengine
from core.config.key import config_key, constructed, unsuited
from core.config.kinds import hints_of, shown, suits
from core.errors import ConfigError, nearest

check_mmengine()  # here, since whatever the engine builds comes by this file

SCOPE = "vitrine"


def _child(parent: Registry) -> Registry:
    return Registry(parent.name, parent=parent, scope=SCOPE, build_func=parent.build_func)


MODELS = _child(root.MODELS)
DATASETS = _child(root.DATASETS)
DATA_SAMPLERS = _child(root.DATA_SAMPLERS)
TRANSFORMS = _child(root.TRANSFORMS)
METRICS = _child(root.METRICS)
EVALUATORS = _child(root.EVALUATOR)
HOOKS = _child(root.HOOKS)
LOOPS = _child(root.LOOPS)
OPTIMIZERS = _child(root.OPTIMIZERS)
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS)
PARAM_SCHEDULERS = _child(root.PARAM_SCHEDULERS)
VISUALIZERS = _child(root.VISUALIZERS)
VISBACKENDS = _child(root.VISBACKENDS)
FUNCTIONS = _child(root.FUNCTIONS)
TASK_UTILS = _child(root.TASK_UTILS)

_ALL = (
    MODELS,
    DATASETS,
    DATA_SAMPLERS,
    TRANSFORMS,
    METRICS,
    EVALUATORS,
    HOOKS,
    LOOPS,
    OPTIMIZERS,
    OPTIM_WRAPPERS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    PARAM_SCHEDULERS,
    VISUALIZERS,
    VISBACKENDS,
    FUNCTIONS,
    TASK_UTILS,
)

# OpenMMLab classes build their own children from nested configs; every other constructor takes built objects.
_OPENMMLAB = ("mmengine", "mmdet", "mmcv")

# Their transforms tell a size (a tuple) from a choice of sizes (a list), and YAML knows lists only.
_SIZES = ("scale", "img_scale", "size", "crop_size", "scale_factor", "pretrain_img_size")

# Keys that the code around a class reads from its config before the constructor sees it.
_READ_AROUND: dict[str, frozenset[str]] = {
    "Hook": frozenset({"priority"}),
    "OptimWrapper": frozenset({"paramwise", "paramwise_cfg", "constructor", "params"}),
    "_ParamScheduler": frozenset({"convert_to_iter_based"}),
    "Visualizer": frozenset({"name", "save_dir"}),
    "_NormBase": frozenset({"requires_grad"}),
    "GroupNorm": frozenset({"requires_grad"}),
    "LayerNorm": frozenset({"requires_grad"}),
}


def resolve(name: str, registry: Registry | None = None) -> Any:
    """The class or function that a config's ``type`` names.

    Args:
        name: a dotted import path (``stvit.SemanticTokenViT``), ``vitrine.X`` / ``mmdet.X`` for a registered name, or a
            bare name registered with mmengine.
        registry: where a registered name is looked up; all registries when None.

    Raises:
        ConfigError: nothing has that name; the message gives the nearest existing ones.
        ImportError: the package exists but fails while it is imported.
    """
    if not isinstance(name, str):
        return name
    package, _, attribute = name.partition(".")
    if not package:
        raise ConfigError(f"type '{name}' is not the name of a class or function")
    if attribute and package not in (SCOPE, "mmdet", "mmengine"):
        return _resolve_path(name)
    _register_openmmlab(package)
    found = _lookup(name, registry)
    if found is not None:
        return found
    if attribute and package != SCOPE and (package != "mmdet" or "." in attribute):
        return _resolve_path(name)
    operators = sys.modules.get("mmcv.ops")  # mmdet names RoI layers and kinds of NMS by their name there alone
    if operators is not None and hasattr(operators, name):
        return getattr(operators, name)
    known = sorted({n for r in _registries(registry) for n in r.module_dict} | _parents_names(registry))
    near = nearest(name if package == "mmdet" else attribute or name, known)
    raise ConfigError(f"type '{name}' is registered nowhere{near}")


def _registries(registry: Registry | None) -> tuple[Registry, ...]:
    return _ALL if registry is None else (registry,)


def _parents_names(registry: Registry | None) -> set[str]:
    """Names in mmengine's registries, and in mmdet's with their scope once it is imported."""
    parents = [r.parent for r in _registries(registry) if r.parent is not None]
    own = {n for parent in parents for n in parent.module_dict}
    return own | {f"mmdet.{n}" for p in parents if "mmdet" in p.children for n in p.children["mmdet"].module_dict}


def _lookup(name: str, registry: Registry | None) -> Any | None:
    scope, _, bare = name.partition(".")
    for candidate in _registries(registry):
        if scope == SCOPE and bare:
            found = candidate.module_dict.get(bare)
        elif "." in name:
            found = candidate.root.get(name)
        else:
            found = candidate.module_dict.get(name) or (candidate.parent or candidate).get(name)
        if found is not None:
            return found
    return None


def _register_openmmlab(package: str) -> None:
    """OpenMMLab classes are in their registries once their modules are imported."""
    importlib.import_module("mmengine.runner")
    importlib.import_module("mmengine.visualization")
    if package == "mmdet":
        importlib.import_module("core.config.mmcv_ops")
        importlib.import_module("mmdet.utils").register_all_modules(init_default_scope=False)


def _resolve_path(name: str) -> Any:
    package, *parts = name.split(".")
    if importlib.util.find_spec(package) is None:
        known = [module.name for module in pkgutil.iter_modules()]
        raise ConfigError(f"type '{name}': there is no package '{package}'{nearest(package, known)}")
    target: Any = importlib.import_module(package)
    for depth, part in enumerate(parts):
        try:
            target = getattr(target, part)
        except AttributeError:
            path = ".".join([package, *parts[: depth + 1]])
            if hasattr(target, "__path__") and importlib.util.find_spec(path) is not None:
                target = importlib.import_module(path)
                continue
            owner = ".".join([package, *parts[:depth]])
            raise ConfigError(f"type '{name}': '{owner}' has no '{part}'{nearest(part, _public(target))}") from None
    return target


def _public(owner: Any) -> list[str]:
    names = getattr(owner, "__all__", None) or dir(owner)
    return [n for n in names if not n.startswith("_")]


def build(cfg: Any, registry: Registry | None = None, **defaults: Any) -> Any:
    """Builds what a config describes; anything that is not a config (no ``type``) is returned as it is.

    Nested configs are built first and passed as objects, except to OpenMMLab classes, which build their own parts.

    Args:
        cfg: ``{"type": ..., **arguments}``, or a list of such, or an object.
        registry: where bare and scoped names are looked up.
        defaults: arguments used where the config is silent.

    Raises:
        ConfigError: unknown type or argument, with the nearest existing names; a value of the wrong kind; whatever a
            constructor raises, with the key below `cfg` (see `core.config.key`).
    """
    if isinstance(cfg, list | tuple):
        return type(cfg)(_build_inside(str(index), item, registry) for index, item in enumerate(cfg))
    if not isinstance(cfg, Mapping):
        return cfg
    if "type" not in cfg:
        return {key: _build_inside(key, value) for key, value in cfg.items()}
    target, name = resolve(cfg["type"], registry), _name(cfg["type"])
    if not callable(target):
        raise ConfigError(f"{shown(cfg['type'])} is not the name of a class or function").within("type")
    arguments = {**defaults, **{k: v for k, v in cfg.items() if k != "type"}}
    check_arguments(target, arguments, where=name)
    check_values(target, arguments, where=name)
    if (package := _openmmlab_package(target)) is not None:
        arguments |= {key: openmmlab(cfg[key], key) for key in arguments if key in cfg}
        with openmmlab_scope(package):
            return constructed(target, arguments, name)
    if not getattr(target, "builds_its_own", False):
        arguments = {key: _build_inside(key, value) for key, value in arguments.items()}
    return constructed(target, arguments, name)


def _build_inside(key: str, value: Any, registry: Registry | None = None) -> Any:
    with config_key(key):
        return build(value, registry)


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _openmmlab_package(target: Any) -> str | None:
    """The OpenMMLab package whose way of building parts a class follows: its own, or the one that it extends."""
    bases = target.__mro__ if getattr(target, "builds_its_own", False) else (target,)
    found = (base.__module__.split(".")[0] for base in bases)
    return next((package for package in found if package in _OPENMMLAB), None)


def openmmlab(value: Any, key: str = "") -> Any:
    """A config as OpenMMLab classes read it: attributes instead of keys, sizes as tuples (YAML knows lists only)."""
    if isinstance(value, Mapping):
        return ConfigDict({k: openmmlab(v, k) for k, v in value.items()})
    if not isinstance(value, list | tuple):
        return value
    if key in _SIZES and value and all(isinstance(v, int | float) for v in value):
        return tuple(value)
    return type(value)(openmmlab(v, key.removesuffix("s") if isinstance(v, list | tuple) else "") for v in value)


@contextmanager
def openmmlab_scope(package: str) -> Iterator[None]:
    """Makes mmdet's bare names (its own defaults, nested in constructors) mean mmdet's classes, whoever builds them."""
    with DefaultScope.overwrite_default_scope(package if package == "mmdet" else None):
        yield


def check_arguments(target: Any, arguments: Iterable[str], *, where: str) -> None:
    """Raises ConfigError, with the nearest existing names, for an argument that `target` does not take."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    read_around = set().union(*(_READ_AROUND.get(base.__name__, ()) for base in getattr(target, "__mro__", ())))
    for name in arguments:
        if name not in parameters and name not in read_around:
            raise ConfigError(f"{where} takes no argument '{name}'{nearest(name, parameters)}")


def check_values(target: Any, arguments: Mapping[str, Any], *, where: str) -> None:
    """Holds values against the type hints of a constructor or function (see `core.config.kinds.suits`).

    What OpenMMLab's classes take is not checked: their hints often name one of the kinds that they read. Nor is a null
    for an argument without a default: an experiment leaves such a key for the user.

    Raises:
        ConfigError: the first value of a kind that is not the hint's, under its key.
    """
    if _openmmlab_package(target) is not None and not getattr(target, "builds_its_own", False):
        return
    for name, (hint, default) in hints_of(target).items():
        value = arguments.get(name, default)
        if value is default or (value is None and default is inspect.Parameter.empty) or suits(value, hint):
            continue
        lies = default is not inspect.Parameter.empty and default is not None and not suits(default, hint)
        if not (lies and type(value) is type(default)):
            raise unsuited(value, hint, where).within(name)


def check(cfg: Any, path: str = "") -> None:
    """Resolves every ``type`` below `cfg` and holds the given arguments against its signature; builds nothing.

    Raises:
        ConfigError: the first unknown type or argument, with its place in the config and the nearest existing names; or
            the first value that does not suit its argument's type hint.
    """
    for place, node in _typed_nodes(cfg, path):
        with config_key(place):
            target, arguments = resolve(node["type"]), {k: v for k, v in node.items() if k != "type"}
            check_arguments(target, arguments, where=node["type"])
            check_values(target, arguments, where=node["type"])


def _typed_nodes(cfg: Any, path: str) -> Iterator[tuple[str, Mapping]]:
    if isinstance(cfg, Mapping):
        if isinstance(cfg.get("type"), str):
            yield path, cfg
        for key, value in cfg.items():
            yield from _typed_nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(cfg, list | tuple):
        for index, value in enumerate(cfg):
            yield from _typed_nodes(value, f"{path}.{index}" if path else str(index))
