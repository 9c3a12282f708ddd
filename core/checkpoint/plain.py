"""Values that a checkpoint can hold, and back: numbers, texts, tensors, arrays, generators, and containers of them.

What `core.checkpoint` cannot hold as it is stands there as a dictionary with its kind.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.checkpoint.files import unusual
from core.errors import VitrineError

_KIND = "__kind__"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_NUMBERS = {int: torch.int64, float: torch.float64}
_LONG = 100  # a list of more numbers is stored as a tensor
# Values in one: the reader (`core.checkpoint.official.limits`) takes a file with far more for a hostile one.
_MOST = 100_000
_FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set)}
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Unsaveable(VitrineError):
    """A value that a checkpoint cannot hold; the message says what it is."""


def pack(value: Any, *, copies: bool = True) -> Any:
    """A value as `core.checkpoint.save_atomic` takes it, and `unpack` gives it back.

    Args:
        value: a number, text, path, tensor, numpy array or scalar, random generator (of ``random``, numpy, or torch on
            the CPU), or a dict, OrderedDict, defaultdict, Counter, list, tuple, set, frozenset or deque of these.
        copies: tensors are copied to the CPU, so that later changes of `value` do not reach the result.

    Raises:
        Unsaveable: anything else, a container that holds itself, or too many values for the reader of checkpoints.
    """
    try:
        packed = _pack(value, copies)
        if (count := _count(packed)) > _MOST:
            raise Unsaveable(f"{type(value).__name__} of {count:,} values, more than a checkpoint is read with")
        return packed
    except RecursionError:
        raise Unsaveable(f"{type(value).__name__}, nested without end") from None


def _count(packed: Any) -> int:
    if isinstance(packed, dict):
        return 1 + sum(map(_count, packed.values()))
    return 1 + sum(map(_count, packed)) if isinstance(packed, list | tuple) else 1


def _pack(value: Any, copies: bool) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in _TENSORS and not unusual(value):
        if not copies:
            return value.detach()
        packed = value.detach().to("cpu", copy=True)
        return packed if value.device.type == "cpu" else {_KIND: "device", "value": packed}
    inner = lambda values: [_pack(v, copies) for v in values]  # noqa: E731
    if kind is list and len(value) > _LONG and len(kinds := set(map(type, value))) == 1 and kinds <= {int, float}:
        with contextlib.suppress(OverflowError, RuntimeError, ValueError):  # whole numbers beyond 64 bits
            return {_KIND: "numbers", "value": torch.tensor(value, dtype=_NUMBERS[kinds.pop()])}
    if kind in (list, tuple):
        return kind(inner(value))
    if kind in (dict, OrderedDict, Counter, defaultdict):
        items = {_key(k): _pack(v, copies) for k, v in value.items()}
        if kind in (dict, OrderedDict):
            return kind(items)
        packed = {_KIND: kind.__name__, "value": items}
        if kind is not defaultdict:
            return packed
        factory = value.default_factory
        if factory is None or _FACTORIES.get(getattr(factory, "__name__", "")) is factory:
            return {**packed, "factory": getattr(factory, "__name__", None)}
        raise Unsaveable("defaultdict with a function of its own")
    if kind in (set, frozenset):
        return {_KIND: kind.__name__, "value": [_key(v) for v in value]}
    if kind is deque:
        return {_KIND: "deque", "value": inner(value), "maxlen": value.maxlen}
    if isinstance(value, Path):
        return {_KIND: "path", "value": str(value)}
    return _pack_special(value)


def _pack_special(value: Any) -> dict[str, Any]:
    if type(value) is np.ndarray or isinstance(value, np.generic):
        try:
            array = np.array(value)
            return {_KIND: "array" if type(value) is np.ndarray else "scalar", "value": torch.from_numpy(array)}
        except (TypeError, ValueError):
            raise Unsaveable(f"numpy {value.dtype}") from None
    if type(value) is random.Random:
        return {_KIND: "random", "value": value.getstate()}
    if type(value) is torch.Generator and value.device.type == "cpu":
        return {_KIND: "generator", "value": value.get_state()}
    if type(value) is np.random.Generator:
        return {_KIND: "numpy", "value": pack(value.bit_generator.state)}
    raise Unsaveable(type(value).__name__)


def _key(key: Any) -> Any:
    """A key of a dictionary or an element of a set, which has to be hashable in its stored form, too."""
    if isinstance(key, np.generic):
        return key.item()
    if type(key) in _PLAIN:
        return key
    if type(key) is tuple:
        return tuple(map(_key, key))
    raise Unsaveable(f"{type(key).__name__} as a key")


def unpack(value: Any, device: torch.device | str = "cpu", text: Callable[[str], str] = str) -> Any:
    """A value as it was before `pack`, copied.

    Args:
        value: from `pack`.
        device: of tensors that were not on the CPU.
        text: what becomes of texts that are not keys.
    """
    kind = type(value)
    if kind is str:
        return text(value)
    if isinstance(value, torch.Tensor):
        return value.clone()
    inner = lambda one: unpack(one, device, text)  # noqa: E731
    if kind in (list, tuple):
        return kind(map(inner, value))
    if kind not in (dict, OrderedDict):
        return value
    if _KIND not in value:
        return kind((key, inner(one)) for key, one in value.items())
    found = inner(value["value"])
    name = value[_KIND]
    if name == "device":
        return found.to(device)
    if name in ("array", "scalar"):
        return found.numpy() if name == "array" else found.numpy()[()]
    if name == "numbers":
        return found.tolist()
    if name == "path":
        return Path(found)
    if name == "deque":
        return deque(found, value["maxlen"])
    if name == "defaultdict":
        return defaultdict(_FACTORIES.get(value["factory"]), found)
    if name in ("random", "generator", "numpy"):
        return _generator(name, found)
    return {"Counter": Counter, "set": set, "frozenset": frozenset}[name](found)


def _generator(name: str, state: Any) -> Any:
    if name == "numpy":
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
    elif name == "random":
        generator = random.Random()
        generator.setstate(state)
    else:
        generator = torch.Generator()
        generator.set_state(state)
    return generator


def same(one: Any, other: Any) -> bool:
    """Whether two packed values are equal, NaN being equal to NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)
