"""Initial weights from a file: a run's checkpoint (averaged weights where it has them), or a bare state dict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from core.checkpoint import load, load_state
from core.errors import ConfigError


def model_state(path: str | Path, *, averaged: bool = True) -> dict[str, Any]:
    """The weights in a file.

    Args:
        path: a run's checkpoint, or a file with a state dict, bare or under ``model`` / ``state_dict``.
        averaged: of a run with EMA, the averaged weights (what evaluation used) instead of the raw ones.

    Raises:
        ConfigError: no file, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no weights file {path}")
    state = load(path)
    if isinstance(state, dict) and "hooks" in state and "position" in state:
        model = dict(state["model"])
        if averaged and "EMAHook" in state["hooks"]:
            model.update(state["hooks"]["EMAHook"]["average"])
        return model
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            return state[key]
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    into: str | None = None,
    prefix: str | None = None,
    strict: bool = True,
    ignore: Sequence[str] = (),
    averaged: bool = True,
) -> str:
    """Loads a file's weights into a model.

    Args:
        model: the trainer.
        path: see `model_state`.
        into: name of the submodule that takes them, e.g. ``network``; None: the whole model.
        prefix: only keys with this prefix, which is cut off, e.g. ``network.`` of another trainer.
        strict: every key has to fit; otherwise what fits is loaded and the rest is reported.
        ignore: patterns of keys that need not fit.
        averaged: see `model_state`.

    Returns:
        One line that says what was loaded.

    Raises:
        ConfigError: no such file or submodule, nothing under the prefix.
        core.checkpoint.StateMismatch: keys or shapes differ, listed.
    """
    state = model_state(path, averaged=averaged)
    if prefix:
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if not state:
            raise ConfigError(f"{path} has no key that begins with '{prefix}'")
    try:
        target = model.get_submodule(into) if into else model
    except AttributeError:
        raise ConfigError(f"load_from.into: {type(model).__name__} has no submodule '{into}'") from None
    difference = load_state(target, state, strict=strict, ignore=tuple(ignore))
    return f"weights from {path}: {difference}" if difference else f"weights from {path}: all {len(state)} keys"
