"""Which tensors went into which: the bookkeeping behind a conversion's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def trace(
    function: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
    """Calls `function(state)` and finds out which entries each entry of its result was computed from.

    Slices, joins, reshapes, arithmetic and copies are all followed, since every operation is seen. What leaves torch
    (a detour over numpy) is lost sight of.

    Args:
        function: from one flat dictionary of tensors to another.
        state: the input.

    Returns:
        The result and, for each of its entries, the names of the inputs in it.
    """
    separate = _separate(state)
    with _Sources(separate) as sources:
        result = dict(function(dict(separate)))
    return result, {name: sources.of(value) for name, value in result.items() if isinstance(value, Tensor)}


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries that share memory but are not the same view get memory of their own, so that they can be told apart."""
    first: dict[int, Tensor] = {}
    separate = {}
    for name, value in state.items():
        other = first.setdefault(_memory(value), value)
        same = other.shape == value.shape and other.stride() == value.stride() and other.data_ptr() == value.data_ptr()
        separate[name] = value if same else value.clone()
    return separate


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Sources(TorchDispatchMode):
    """Names of inputs by memory: a view has its base's, the result of an operation those of all its operands."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names: dict[int, set[str]] = {}
        self._alive: list[Any] = []  # memory that is freed could come back as another tensor's
        for name, value in state.items():
            self._names.setdefault(_memory(value), set()).add(name)
            self._alive.append(value)

    def of(self, tensor: Tensor) -> set[str]:
        """The inputs that went into a tensor."""
        return set(self._names.get(_memory(tensor), ()))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = [t for t in tree_iter((args, kwargs or {})) if isinstance(t, Tensor) and t.layout is torch.strided]
        names = set().union(*(self.of(t) for t in operands)) if operands else set()
        for result in tree_iter(out):
            if isinstance(result, Tensor) and result.layout is torch.strided:
                self._names.setdefault(_memory(result), set()).update(names)
                self._alive.append(result.untyped_storage())
        return out
