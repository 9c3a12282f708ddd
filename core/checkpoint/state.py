"""State dicts into models: compared first, loaded whole or not at all."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from core.checkpoint.files import unusual
from core.errors import VitrineError, close_names, one_line

_SHOWN = 12
_LONGEST_NAME = 200  # of those that are compared in spelling, which takes the square of the length


@dataclass(frozen=True)
class StateDiff:
    """How a state dict differs from what a model expects; complete, whatever `str()` shortens.

    Attributes:
        missing: keys of the model that the state lacks -> what the model holds there.
        unexpected: keys of the state that the model has no place for -> what the state holds there.
        mismatched: keys of both -> (what the model holds, what the state holds).
    """

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """True when anything differs."""
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        differing = [
            f"{_name(k)}: the model has {own}, the state has {given}"
            for k, (own, given) in itertools.islice(self.mismatched.items(), _SHOWN)
        ]
        missing = [f"{_name(k)} {what}{self._near(k)}" for k, what in self._first(self.missing)]
        unexpected = [f"{_name(k)} {what}" for k, what in self._first(self.unexpected)]
        return "\n".join(
            _section("differing", differing, len(self.mismatched))
            + _section("missing from the state", missing, len(self.missing))
            + _section("unknown to the model", unexpected, len(self.unexpected))
        )

    @staticmethod
    def _first(part: dict[str, str]) -> list[tuple[str, str]]:
        return list(itertools.islice(part.items(), _SHOWN))

    def _near(self, key: str) -> str:
        """Names in the state that may be this key under another name: near in spelling, the same in shape."""
        same = [k for k, what in self.unexpected.items() if what == self.missing[key] and len(k) <= _LONGEST_NAME]
        near = close_names(key, same[:2000], count=1, cutoff=0.6)
        return f" (perhaps '{near[0]}'?)" if near else ""

    def without(self, patterns: Iterable[str]) -> StateDiff:
        """The difference without keys that match one of the shell patterns (``head.*``)."""
        keep = lambda key: not any(fnmatch.fnmatchcase(key, p) for p in patterns)  # noqa: E731
        return StateDiff(
            *({k: v for k, v in part.items() if keep(k)} for part in (self.missing, self.unexpected, self.mismatched))
        )


class StateMismatch(VitrineError, RuntimeError):
    """A state dict does not fit a model; `diff` holds every difference."""

    def __init__(self, message: str, diff: StateDiff) -> None:
        super().__init__(message)
        self.diff = diff


def _section(title: str, lines: list[str], count: int) -> list[str]:
    if not count:
        return []
    more = [f"  ... and {count - len(lines)} more"] if count > len(lines) else []
    return [f"{title} ({count}):", *(f"  {line}" for line in lines), *more]


def _name(key: Any) -> str:
    """A file's name for something, fit to be printed."""
    return one_line(str(key), 120)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _describe_given(value: Any) -> str:
    form = unusual(value) if isinstance(value, torch.Tensor) else None
    return f"{_describe(value)}, {form}" if form else _describe(value)


def _kind(dtype: torch.dtype) -> str:
    return (
        "complex"
        if dtype.is_complex
        else "float"
        if dtype.is_floating_point
        else "bool"
        if dtype == torch.bool
        else "int"
    )


def _fits(own: Any, given: Any) -> bool:
    if not isinstance(own, torch.Tensor):
        return True  # extra state: the module that asked for it judges it
    if not isinstance(given, torch.Tensor) or own.shape != given.shape or unusual(given):
        return False
    return own.dtype == given.dtype or _kind(own.dtype) == _kind(given.dtype)


def diff_state(model: nn.Module | Mapping[str, Any], state: Mapping[str, Any]) -> StateDiff:
    """Compares keys, shapes and kinds of number (float, int, bool) of a model and a state dict.

    Args:
        model: the module, or its state dict (meta tensors do).
        state: the state dict to be loaded.
    """
    own = model.state_dict() if isinstance(model, nn.Module) else model
    differing = {k: (own[k], v) for k, v in state.items() if k in own and not _fits(own[k], v)}
    return StateDiff(
        missing={k: _describe(v) for k, v in own.items() if k not in state},
        unexpected={k: _describe(v) for k, v in state.items() if k not in own},
        mismatched={k: (_describe(a), _describe_given(b)) for k, (a, b) in differing.items()},
    )


def load_state(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    ignore: Iterable[str] = (),
) -> StateDiff:
    """Loads a state dict into a model, or raises before anything has changed.

    Args:
        model: the module.
        state: names -> tensors.
        strict: every key of either side must find its match.
        ignore: shell patterns (``head.*``) of keys that may be missing, unknown or of another shape; a matching key is
            loaded where it fits.

    Returns:
        The difference, ignored keys included; with ``strict=False`` whatever fits was loaded.

    Raises:
        StateMismatch: the difference is not empty and `strict`, or nothing at all fits; the model is unchanged.
    """
    name = type(model).__name__
    odd = next((k for k in state if not isinstance(k, str)), None)
    if odd is not None:
        what = f"'{_name(odd)}' ({type(odd).__name__})"
        raise StateMismatch(f"the state does not fit {name}: its key {what} is not a name of a parameter", StateDiff())
    state = dict(state)
    diff = diff_state(model, state)
    counted = diff.without(list(ignore))
    if strict and counted:
        raise StateMismatch(f"the state does not fit {name}; nothing was loaded.\n{counted}", counted)
    fitting = {k: v for k, v in state.items() if k not in diff.unexpected and k not in diff.mismatched}
    if state and not fitting:
        raise StateMismatch(f"no key of the state fits {name}; nothing was loaded.\n{diff}", diff)
    _load_whole(model, fitting)
    return diff


def _load_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads keys that were found to fit; when a module's own loading code fails after all, everything is put back."""
    before = None
    if _has_own_loading(model):
        before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in model.state_dict().items()}
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:
        if before is not None:
            model.load_state_dict(before, strict=False)
        reason = one_line(str(error) or type(error).__name__, 400)
        raise StateMismatch(f"{type(model).__name__} refuses the state: {reason}", StateDiff()) from error


def _has_own_loading(model: nn.Module) -> bool:
    for module in model.modules():
        own = type(module)._load_from_state_dict.__module__
        hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
        if hooks or not own.startswith("torch.nn.") or type(module).set_extra_state is not nn.Module.set_extra_state:
            return True
    return False
