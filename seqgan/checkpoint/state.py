"""What all layouts of weights share: renaming without losses, joined projections, a strict fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from core.checkpoint.fitting import CheckpointMismatch

State = dict[str, Tensor]


def rename(state: Mapping[str, Tensor], names: Mapping[str, str], source: str) -> State:
    """Entries under other names.

    Args:
        state: name to tensor.
        names: old to new name, of entries or of the modules that hold them.
        source: what the state is said to be, for the error.

    Raises:
        CheckpointMismatch: entries that `names` has no place for.
    """
    renamed, unknown = {}, []
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        if name in names:
            renamed[names[name]] = value
        elif module in names:
            renamed[f"{names[module]}.{leaf}"] = value
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointMismatch(f"no place in {source} for {listed(unknown)} (drop=[PATTERN] leaves entries out)")
    return renamed


def swapped(names: Mapping[str, str]) -> dict[str, str]:
    """The names of the way back."""
    return {new: old for old, new in names.items()}


def join_qkv(state: Mapping[str, Tensor]) -> State:
    """Separate projections `X.q`, `X.k`, `X.v` as one `X.qkv` of three times the rows."""
    joined: State = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.|)([qkv])\.(weight|bias)", name)
        if match is None:
            joined[name] = value
        elif match[2] == "q":
            parts = [value, *(_entry(state, f"{match[1]}{which}.{match[3]}") for which in "kv")]
            joined[f"{match[1]}qkv.{match[3]}"] = torch.cat(parts)
    return joined


def split_qkv(state: Mapping[str, Tensor]) -> State:
    """The way back of `join_qkv`."""
    split: State = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.|)qkv\.(weight|bias)", name)
        if match is None:
            split[name] = value
        else:
            parts = zip("qkv", value.chunk(3), strict=True)
            split |= {f"{match[1]}{which}.{match[2]}": part for which, part in parts}
    return split


def count(state: Iterable[str], pattern: str) -> int:
    """How many different first groups of `pattern` begin the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def mapped(state: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> State:
    """Entries with changed values."""
    return {name: change(name, value) for name, value in state.items()}


def listed(names: list[str], limit: int = 8) -> str:
    """Some of the names, for an error."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "nothing"


def _entry(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointMismatch(f"{name} is missing: the file is incomplete")
    return state[name]
