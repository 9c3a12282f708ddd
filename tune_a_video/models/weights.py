"""Networks' folders and small files of tuned tensors, read from local disk without executing anything in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from core.layers.weight_files import read_state

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
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file holds something else, or is cut off; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON in UTF-8 ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object: copy or download it again")
    return content


def read_network(
    path: str | os.PathLike[str], subfolder: str | None = None, variant: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a network's folder, whole or in shards; safetensors before `.bin`.

    Args:
        path: the folder.
        subfolder: below it.
        variant: the part of the file name before its suffix, such as `fp16`.

    Raises:
        FileNotFoundError: there is no configuration or no file of weights; the message lists the names tried.
        ValueError: an index or a file is damaged; the message names it.
    """
    folder = Path(path) / subfolder if subfolder else Path(path)
    config = read_config(folder)
    names = _file_names(variant)
    for name in names:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".json"):
            return config, read_tensors(file)
        places = read_json(file).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise ValueError(f"{file} has no weight_map of names and files: copy or download it again")
        state: dict[str, Tensor] = {}
        for shard in sorted(set(places.values())):
            state |= read_tensors(folder / shard)
        return config, state
    there = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    raise FileNotFoundError(
        f"no weights in {folder}: looked for {', '.join(names)}"
        + (f"; there are {', '.join(there[:6])}: name their variant" if there else "")
    )


def _file_names(variant: str | None) -> list[str]:
    """What diffusers calls a network's files, or their index; its older releases put the variant in other places."""
    names = []
    for kind in ("safetensors", "bin"):
        if variant is None:
            names += [f"{_STEM}.{kind}", f"{_STEM}.{kind}.index.json"]
        else:
            indices = (f"{kind}.index.{variant}", f"{kind}.{variant}.index", f"{variant}.{kind}.index")
            names += [f"{_STEM}.{variant}.{kind}", *(f"{_STEM}.{index}.json" for index in indices)]
    return [*names, "pytorch_model.bin"]


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than tensors by name, or is damaged.
    """
    state = read_state(Path(path), f"no weights file {path}")
    if not all(isinstance(value, Tensor) for value in state.values()):
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
    return read_tensors(path), read_json(about) if about.is_file() else {}
