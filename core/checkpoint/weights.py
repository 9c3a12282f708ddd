"""Weights from a file into a model: a run's checkpoint, a network's own state dict, or any part of either.

One form serves everywhere: the keys of a config's `load_from` are the options of ``tools/test.py`` and
``tools/infer.py``, and what ``tools/convert.py`` writes fits without any of them. A file is held against the whole
model first, then against its parts; what fits none or several of them is an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from core.checkpoint import (
    OFFICIAL_GLOBALS,
    StateMismatch,
    UnsafeCheckpointError,
    diff_state,
    load,
    load_official,
    load_state,
)
from core.checkpoint.placement import COUNTERS, as_built, entries, holder, join, mismatch, place, submodule
from core.checkpoint.run_folder import find_checkpoint
from core.errors import ConfigError, VitrineError, some

#: Where files keep averaged weights beside the others; these are what timm takes, too.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
#: Where files keep the weights, in the order in which they are tried.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "params",
    "state",
    "module",
    "teacher",
)


# ---------------------------------------------------------------------- from a file
def model_state(path: str | Path, *, key: str | None = None, averaged: bool = True) -> dict[str, Any]:
    """The weights in a file.

    Args:
        path: a run's checkpoint, or a file with a state dict: .pt, .pth, .safetensors or .npz, bare or in a container.
        key: where in the file the weights are, e.g. ``ema.model``; None: a run's model, else see `CONTAINERS`.
        averaged: where there are averaged weights (EMA) beside the raw ones, those: of a run, or see `AVERAGES`.

    Raises:
        ConfigError: no file, or no state dict in it.
        core.checkpoint.CheckpointReadError: the file is damaged or asks for more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no weights file {path}")
    return state_in(read(path), path, key=key, averaged=averaged)[0]


def state_in(
    content: Any, path: Path, *, key: str | None = None, averaged: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """The weights in the content of a file, and the names of what lies beside them.

    Args:
        content: from `read`.
        path: for messages.
        key: see `model_state`.
        averaged: see `model_state`.

    Raises:
        ConfigError: nothing at `key`, or no tensors there.
    """
    if key is None and isinstance(content, Mapping) and {"model", "hooks", "position"} <= content.keys():
        return _model_of_run(content, path, averaged), sorted(set(content) - {"model"})
    weights, aside = _container(content, path, key, averaged)
    state: dict[str, Any] = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.dtype.itemsize <= 16:
            value = torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
        if isinstance(value, Tensor) and name != "n_averaged":  # a counter of torch's AveragedModel
            state[str(name)] = value.detach()
        elif str(name).endswith("_extra_state"):
            state[str(name)] = value
        else:
            aside.append(str(name))
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"'{path}' holds no tensors{f' under key={key}' if key else ''}{_places(content)}")
    return state, aside


def _model_of_run(content: Mapping[str, Any], path: Path, averaged: bool) -> dict[str, Any]:
    """The weights in a run's checkpoint, with the averages laid over them where there are."""
    hooks = content["hooks"]
    ema = hooks.get("EMAHook") if isinstance(hooks, Mapping) else None
    parts = [content["model"]]
    if averaged and ema is not None:
        parts.append(ema.get("average") if isinstance(ema, Mapping) else None)
    elif averaged:  # mmengine's EMAHook puts its average where deployment looks for weights
        kept = content.get("kept")
        added = kept.get("checkpoint") if isinstance(kept, Mapping) else None
        if isinstance(added, Mapping) and "ema_state_dict" in added:
            parts.append(added.get("state_dict"))
    if not isinstance(hooks, Mapping) or not all(isinstance(part, Mapping) for part in parts):
        raise ConfigError(f"'{path}' is not a whole checkpoint of a run: its model or hooks are of a wrong kind")
    return {name: value for part in parts for name, value in part.items()}


def read(path: Path, allow: Iterable[str] = ()) -> Any:
    """The content of a checkpoint file; nothing in it is executed.

    Args:
        path: the file; pickles of others are read as plain data.
        allow: further names that such a pickle may mention.
    """
    try:
        return load(path)
    except UnsafeCheckpointError:
        return load_official(path, allow=OFFICIAL_GLOBALS | set(allow))


def _container(content: Any, path: Path, key: str | None, averaged: bool) -> tuple[Mapping[str, Any], list[str]]:
    """The dictionary of weights in a file, and the names of what lies beside it."""
    for step in key.split(".") if key else []:
        if not isinstance(content, Mapping) or step not in content:
            known = sorted(map(str, content)) if isinstance(content, Mapping) else []
            raise ConfigError(f"'{path}' has nothing at key={key} (at '{step}' there are: {some(known, 12)})")
        content = content[step]
    if not isinstance(content, Mapping):
        raise ConfigError(f"'{path}' holds a {type(content).__name__}, not a dictionary of tensors")
    if key is None:
        for name in (*AVERAGES, *CONTAINERS) if averaged else (*CONTAINERS, *AVERAGES):
            inner = content.get(name)
            if isinstance(inner, Mapping) and any(hasattr(value, "shape") for value in inner.values()):
                return inner, [str(other) for other in content if other != name]
    return content, []


def _places(content: Any) -> str:
    """Where else there are weights, for messages."""
    if not isinstance(content, Mapping):
        return ""
    found = [
        f"key={name}"
        for name, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
    ]
    return f"; there are weights at {some(found)}" if found else ""


# ---------------------------------------------------------------------- into a model
@dataclass(frozen=True)
class Source:
    """A file of weights and what of it goes where: an entry of a config's `load_from`.

    Args:
        path: see `model_state`; or the folder of a run, whose newest whole checkpoint is meant.
        key: see `model_state`.
        into: name of the submodule that takes the weights, e.g. ``network.backbone``; None: the whole model, or else
            the one part that they fit, `inference_network()` before all others.
        prefix: only names with this prefix, which is cut off, e.g. ``network.`` of another trainer. A file without such
            names that fits as it is may be given, too.
        strict: every name has to find its match; otherwise what fits is loaded.
        ignore: shell patterns of names that need not find one, e.g. ``head.*``.
        averaged: see `model_state`.
        finite: refuse weights that hold NaN or infinity.
        best: of a run's folder, the best checkpoint (by a metric's name) instead of the newest.
        rest: a `load_from` of its own, which is loaded first where this file lacks a part of the model.
    """

    path: str | Path
    key: str | None = None
    into: str | None = None
    prefix: str | None = None
    strict: bool = True
    ignore: str | Sequence[str] = ()
    averaged: bool = True
    finite: bool = True
    best: bool | str = False
    rest: Any = None

    @property
    def tolerated(self) -> tuple[str, ...]:
        """Patterns of names that need not find their match."""
        return (*((self.ignore,) if isinstance(self.ignore, str) else self.ignore), COUNTERS)


def load_weights(model: nn.Module, path: str | Path, **options: Any) -> str:
    """Loads a file's weights into a model.

    Args:
        model: a trainer, one of mmdet's detectors, or any module.
        path: see `Source`.
        options: see `Source`.

    Returns:
        What was loaded from where, and which parts of the model are left as they were built.

    Raises:
        ConfigError: no such file or submodule, several submodules that the file fits, nothing under the prefix, weights
            that hold NaN or infinity.
        core.checkpoint.StateMismatch: names or shapes differ; all are listed. The model is as before.
    """
    return "\n".join(load_sources(model, {"path": path, **options}))


def load_sources(model: nn.Module, sources: Any, tolerate: Callable[[VitrineError], None] | None = None) -> list[str]:
    """Loads everything that a config's `load_from` names, in order.

    Args:
        model: see `load_weights`.
        sources: a path, a mapping with the fields of `Source`, a list of these, or None.
        tolerate: is told of a source that cannot be loaded, and the others follow; None: that is an error.

    Returns:
        As `load_weights`, line by line.

    Raises:
        ConfigError: see `load_weights`; or an entry without a path, or with an unknown key.
        core.checkpoint.StateMismatch: see `load_weights`.
    """
    lines: list[str] = []
    loaded: set[str] = set()
    for source in sources_of(sources):
        try:
            lines += _load(model, source, loaded)
        except VitrineError as error:
            if tolerate is None:
                raise
            tolerate(error)
    built = as_built(model, loaded)
    return [*lines, f"left as built: {built}"] if lines and built else lines


def sources_of(sources: Any) -> list[Source]:
    """The entries of a `load_from`.

    Raises:
        ConfigError: an entry without a path, or with an unknown key.
    """
    from core.config.registry import check_arguments

    found = []
    for one in sources if isinstance(sources, list | tuple) else [] if sources is None else [sources]:
        entry = {"path": one} if isinstance(one, str | Path) else one
        if not isinstance(entry, Mapping):
            raise ConfigError(f"load_from={one!r}: give a path, or {{path: ..., into: ...}}, or a list of these")
        check_arguments(Source, entry, where="load_from")
        if not entry.get("path"):
            raise ConfigError(f"load_from={dict(entry)}: `path` is missing: a file of weights, or the folder of a run")
        found.append(Source(**entry))
    return found


def not_finite(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of tensors with NaN or infinity, unless the model computes such values there itself (masks)."""
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and not _finite(value) and not (name in own and not _finite(own[name]))
    ]


def _finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return True
    return bool(torch.isfinite(value if value.element_size() > 1 else value.float()).all())


def _load(model: nn.Module, source: Source, loaded: set[str]) -> list[str]:
    """Loads one source and adds the names of what was loaded to `loaded`."""
    path = find_checkpoint(source.path, best=source.best)
    state = model_state(path, key=source.key, averaged=source.averaged)
    if source.into is not None:
        submodule(model, source.into)
    if source.prefix:
        state = _under(model, source, path, state)
    into = source.into
    if into is None:
        into, state = place(model, state, source.tolerated, source.strict)
    target = submodule(model, into)
    own = entries(model, into, state)
    diff = diff_state(own, state)
    name = f"{type(target).__name__} ({into})" if into else type(target).__name__
    if source.strict and (counted := diff.without(source.tolerated)):
        raise StateMismatch(f"{path} {mismatch(name, own, state, counted, source.tolerated)}", counted)
    if source.finite and (broken := not_finite(state, own)):
        raise ConfigError(
            f"{path} holds NaN or infinity in {len(broken)} of {len(state)} tensors ({some(broken)}): such weights "
            "answer nothing of meaning. Take an earlier checkpoint; finite=false loads them all the same"
        )
    lines = []
    if source.rest is not None and (into or diff.missing):
        lines = _load_rest(model, source.rest, loaded)
    load_state(target, state, strict=False)  # what differs has been judged above
    loaded.update(join(into, key) for key in state if key in own and key not in diff.mismatched)
    if not into and not diff.missing:  # whatever a model leaves out of its state is meant to stay as it is
        loaded.update(name for name, _ in target.named_parameters())
    told = diff.without((COUNTERS,)) or f"all {len(state)} keys"
    return [*lines, f"weights from {path}{f' into {into}' if into else ''}: {told}"]


def _load_rest(model: nn.Module, rest: Any, loaded: set[str]) -> list[str]:
    try:
        return [line for one in sources_of(rest) for line in _load(model, one, loaded)]
    except VitrineError as error:
        raise ConfigError(
            f"{error}\n(load_from gives what the file of weights lacks; load_from=null leaves that as it was built)"
        ) from error


def _under(model: nn.Module, source: Source, path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state dict below the source's prefix; all of it where it is that part alone already."""
    prefix = str(source.prefix)
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if inside:
        return inside
    part = prefix.removesuffix(".") if source.into is None and isinstance(model, BaseModel) else source.into or ""
    if part in dict(holder(model).named_modules()) and state.keys() & entries(model, part, state).keys():
        return state
    first = sorted({f"{name.partition('.')[0]}." for name in state if "." in name})
    raise ConfigError(f"{path} has no key that begins with '{prefix}' (its keys begin with {some(first, 6)})")
