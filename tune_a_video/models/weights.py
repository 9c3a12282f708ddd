"""Networks' folders and small files of tuned tensors, read from local disk without executing anything in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG_NAME = "config.json"
_STEM = "diffusion_pytorch_model"


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A network's configuration.

    Raises:
        FileNotFoundError: the folder has none.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no {CONFIG_NAME} in {Path(folder)}: give the folder of a diffusers network (a pipeline has it in unet/)"
        )
    return json.loads(path.read_text())


def read_network(
    path: str | os.PathLike[str], subfolder: str | None = None, variant: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a network's folder; safetensors (also in shards) before `.bin`.

    Args:
        path: the folder.
        subfolder: below it.
        variant: the part of the file name before its suffix, such as `fp16`.

    Raises:
        FileNotFoundError: there is no configuration or no file of weights; the message lists the names tried.
    """
    folder = Path(path) / subfolder if subfolder else Path(path)
    config = read_config(folder)
    stem = f"{_STEM}.{variant}" if variant else _STEM
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.bin", "pytorch_model.bin")
    for name in names:
        file = folder / name
        if not file.is_file():
            continue
        if name.endswith(".index.json"):
            shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
            state: dict[str, Tensor] = {}
            for shard in shards:
                state |= read_tensors(folder / shard)
            return config, state
        return config, read_tensors(file)
    raise FileNotFoundError(f"no weights in {folder}: looked for {', '.join(names)}")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no tensors by name")
    return dict(state)


def write_delta(path: str | os.PathLike[str], state: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Tensors as `PATH.safetensors`, `about` as `PATH.json`; the path of the tensors."""
    from safetensors.torch import save_file

    path = Path(path).with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(dict(about), indent=1) + "\n")
    return path


def read_delta(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of `write_delta`, or the tensors of another file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file() and path.with_suffix(".safetensors").is_file():
        path = path.with_suffix(".safetensors")
    about = path.with_suffix(".json")
    return read_tensors(path), json.loads(about.read_text()) if about.is_file() else {}
