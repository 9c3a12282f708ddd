"""Weights from a local file for models, which import nothing of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def plain_read(path: Path) -> Any:
    """The content of a safetensors or torch file, which consists of tensors, numbers and texts."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


#: Reads a file of weights. Trainers put `core.checkpoint.load` here, whose time and memory are bounded.
read_file: Callable[[Path], Any] = plain_read


def read_state(path: Path, absent: str) -> Mapping[str, Any]:
    """The names and values that a file of weights holds.

    Args:
        path: the file.
        absent: what is wrong, and what to do, where there is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else than values by name.
    """
    if not path.is_file():
        raise FileNotFoundError(absent)
    try:
        state = read_file(path)
    except ValueError:
        raise
    except Exception as error:  # torch and safetensors have many; their advice is not ours
        raise ValueError(
            f"{path} is damaged, or not a file of weights ({type(error).__name__}): get it again"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, no tensors by name: choose another file")
    return state
