"""Kinds of config values: whether a value suits a type hint, and how one says in words what would.

Lenient where a config cannot know better: a whole number is a number, a list is a tuple or any other sequence, a text
is a path, a device, a function or a member of an enumeration, and what has no hint takes everything.
"""

from __future__ import annotations

import enum
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

_SEQUENCES = (list, tuple, set, frozenset, Sequence, Iterable, Collection, typing.Iterator)
_UNIONS = (typing.Union, types.UnionType)


@dataclass(frozen=True)
class Range:
    """A number's bounds, both included unless `above`, as metadata of ``Annotated[int, Range(1)]``."""

    low: float
    high: float = math.inf
    above: bool = False  # the lower one is excluded

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low}" + (f", at most {self.high}" if self.high < math.inf else "")
        return f"from {self.low} on" if self.high == math.inf else f"from {self.low} to {self.high}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1, above=True)]


class Built:
    """As a hint: something that the config builds, ``{type: ..., ...}``, or an object that is built already."""


def suits(value: Any, hint: Any) -> bool:
    """Whether a config's value can be meant for a parameter with this hint."""
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    if hint in (Any, inspect.Parameter.empty, object) or isinstance(hint, str | typing.ForwardRef | typing.TypeVar):
        return True
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return suits(value, inner[0]) and all(_within(value, one) for one in hint.__metadata__)
    if origin in _UNIONS:
        return any(suits(value, one) for one in inner)
    if value is None or hint in (None, type(None)):
        return value is None and hint in (None, type(None))
    if not _plain(value):
        return True  # an object that is built already
    if hint is Built:
        return isinstance(value, Mapping) and bool(value.get("type"))
    if isinstance(value, Mapping) and "type" in value:
        return True  # what is built of it is known only then
    if origin is Literal:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in inner)
    if hint is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if hint in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (hint is float or float(value).is_integer())
    if hint is str:
        return isinstance(value, str)
    return _suits_container(value, origin or hint, inner)


def _suits_container(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and (len(inner) != 2 or all(suits(v, inner[1]) for v in value.values()))
    if origin in _SEQUENCES:
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(suits(v, one) for v, one in zip(value, inner, strict=True))
        return not inner or all(suits(item, inner[0]) for item in value)
    if inspect.isclass(origin) and issubclass(origin, os.PathLike):
        return isinstance(value, str)
    return not (isinstance(value, str | bool) and _is_made_of_numbers(origin)) and not _has_to_be_built(origin)


def _within(value: Any, bound: Any) -> bool:
    if not isinstance(bound, Range) or not isinstance(value, int | float):
        return True
    return bound.low <= value <= bound.high and not (bound.above and value == bound.low)


def _plain(value: Any) -> bool:
    """Whether a value is as it stands in a config file, not an object that somebody has built."""
    return value is None or isinstance(value, str | int | float | list | tuple | Mapping)


def _is_made_of_numbers(hint: Any) -> bool:
    return _is_torchs(hint, "Tensor")


def _has_to_be_built(hint: Any) -> bool:
    """Whether no text or number can stand for such an object; of other classes, a text may be the name of one."""
    return _is_torchs(hint, "Module", "Dataset", "Sampler", "Optimizer")


def _is_torchs(hint: Any, *names: str) -> bool:
    bases = hint.__mro__ if inspect.isclass(hint) else ()
    return any(base.__module__.partition(".")[0] == "torch" and base.__name__ in names for base in bases)


def kind(value: Any) -> str:
    """What a config's value is, in words."""
    if value is None:
        return "null"
    names = {bool: "a truth value", int: "a whole number", float: "a number", str: "a text"}
    if type(value) in names:
        return names[type(value)]
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def expected(hint: Any) -> str:
    """What suits a hint, in words: ``a whole number from 1 on, or null``."""
    if typing.get_origin(hint) in _UNIONS:
        words = [expected(one) for one in typing.get_args(hint)]
        if "a number" in words and "a whole number" in words:
            words.remove("a whole number")
        words = list(dict.fromkeys(words))
        return " or ".join(words)
    return _expected(hint, typing.get_origin(hint), typing.get_args(hint))


def _expected(hint: Any, origin: Any, inner: tuple[Any, ...]) -> str:
    if origin is Annotated:
        return " ".join([expected(inner[0]), *(str(one) for one in hint.__metadata__ if isinstance(one, Range))])
    if origin is Literal:
        return "one of " + ", ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in inner)
    words = {
        None: "null",
        type(None): "null",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Built: "a mapping with a type",
    }
    if hint in words:
        return words[hint]
    plain = origin or hint
    if inspect.isclass(plain) and issubclass(plain, Mapping):
        return f"a mapping of names to {_several(inner[1])}" if len(inner) == 2 and inner[1] is not Any else "a mapping"
    if plain is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}: " + ", ".join(expected(one) for one in inner)
    if plain in _SEQUENCES:
        return f"a list of {_several(inner[0])}" if inner and inner[0] is not Any else "a list"
    if inspect.isclass(plain) and issubclass(plain, enum.Enum):
        return "one of " + ", ".join(str(one.value) for one in plain)
    if inspect.isclass(plain) and issubclass(plain, os.PathLike):
        return "a path"
    if _is_made_of_numbers(plain):
        return "a tensor"
    if plain in (Callable, typing.Callable):
        return "a function"
    return f"{{type: ...}} of a {getattr(plain, '__name__', plain)}"


def _several(hint: Any) -> str:
    words = expected(hint)
    for one, many in (("a whole number", "whole numbers"), ("a number", "numbers"), ("a text", "texts")):
        words = words.replace(one, many)
    return words.replace("a list", "lists").replace("a mapping", "mappings")


def innermost(value: Any, hint: Any) -> tuple[str, Any, Any]:
    """The part of a value that does not suit: its dotted place (empty: the whole), what is there, and its hint."""
    for one in typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,):
        origin, inner = typing.get_origin(one), typing.get_args(one)
        alike = origin in _SEQUENCES and (origin is not tuple or inner[-1] is Ellipsis)  # all items have one hint
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping) and inspect.isclass(origin) and issubclass(origin, Mapping) and len(inner) == 2:
            items, inside = value.items(), inner[1]
        elif isinstance(value, list | tuple) and alike:
            items, inside = enumerate(value), inner[0]
        for key, item in items:
            if not suits(item, inside):
                place, part, wanted = innermost(item, inside)
                return f"{key}.{place}".rstrip("."), part, wanted
    return "", value, hint


def complaint(value: Any, hint: Any, owner: str = "it") -> str:
    """What is wrong with a value that does not suit: ``three is a text, stvit.Network takes a whole number``."""
    wanted = expected(hint)
    told = value is None or kind(value) in wanted or "one of " in wanted
    wrong = "does not suit" if told else f"is {kind(value)}"
    return f"{shown(value)} {wrong}, {owner} takes {wanted}"


def shown(value: Any, width: int = 80) -> str:
    """A config's value as one writes it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {shown(inner, width)}" for key, inner in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(shown(item, width) for item in value) + "]"
    elif isinstance(value, str | int | float):
        text = repr(value) if value == "" else str(value)
    else:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= width else f"{text[: width - 3]}..."


def hints_of(target: Any) -> dict[str, tuple[Any, Any]]:
    """Parameter -> (hint, default) of a class's constructor or a function, where both are known.

    Hints as texts are read one by one: what a module imports for type checkers alone leaves the others readable.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    names = {**vars(typing), **getattr(function, "__globals__", {})}
    found = {}
    for name, parameter in parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, names)
            except Exception:
                continue
        if hint is not inspect.Parameter.empty:
            found[name] = (hint, parameter.default)
    return found
