"""The choice of channels as a file: indices, scores and what they came from, between the two stages (section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petl.checkpoint.packing import read_packed, write_packed
from petl.models.importance import Scores

KIND = "petl.choice"


def save_choice(path: str | Path, channels: Sequence[Any], scores: Scores, **origin: Any) -> Path:
    """Writes what `Scores.select` gave, with the scores.

    Args:
        path: ends in ``.safetensors``.
        channels: of every block: indices, or mappings of `q` and `v`.
        scores: from which they were chosen.
        origin: further plain values, e.g. weights, data, k and allocation.
    """
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(channels):
        for part, indices in (block if isinstance(block, Mapping) else {"": block}).items():
            tensors[f"channels.{index}.{part}"] = torch.as_tensor(indices, dtype=torch.long)
    for part, values in scores.values.items():
        for index, value in enumerate(values):
            tensors[f"scores.{index}.{part}"] = value
    header = {"site": scores.site, "blocks": len(channels), "origin": {**scores.origin, **origin}}
    write_packed(path, tensors, header, KIND)
    return Path(path)


def load_choice(path: str | Path) -> tuple[list[Any], Scores]:
    """Channels as `petl.TTC(channels=...)` takes them, and the scores with their origin.

    Raises:
        DeltaError: no such file, or another one.
    """
    tensors, header = read_packed(path, KIND)
    channels: list[Any] = []
    values: dict[str, list[Tensor]] = {}
    for index in range(header["blocks"]):
        parts = {name.split(".")[2]: v for name, v in tensors.items() if name.startswith(f"channels.{index}.")}
        channels.append(parts[""].tolist() if "" in parts else {part: v.tolist() for part, v in parts.items()})
        for name, value in tensors.items():
            if name.startswith(f"scores.{index}."):
                values.setdefault(name.split(".")[2], []).append(value)
    return channels, Scores(values, header["site"], header["origin"])
