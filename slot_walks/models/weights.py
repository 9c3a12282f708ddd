"""A backbone's weights from a local file: DINO's, timm's or our own, torch or safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from core.layers.weight_files import read_state

# Where files keep the weights, and what stands in front of a backbone's names in them.
_CONTAINERS = ("teacher", "state_dict", "model")
_PREFIXES = ("module.", "backbone.", "encoder.", "vit_encoder.")


def read_backbone(backbone: nn.Module, path: str | PathLike[str]) -> None:
    """Load a backbone from a file; a classifier or projection head in it is left out.

    On the meta device nothing is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys or shapes do not fit; all are named.
    """
    own = backbone.state_dict()
    if any(value.is_meta for value in own.values()):
        return
    state = {name: value for name, value in _read(Path(path)).items() if not name.startswith(("head.", "fc_norm."))}
    lacking, strange = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if lacking or strange or shapes:
        raise ValueError(
            f"{path} does not fit {type(backbone).__name__}: missing {lacking or 'nothing'}, unexpected "
            f"{strange or 'nothing'}, of another shape {sorted(shapes) or 'nothing'}; choose the backbone of that file"
        )
    backbone.load_state_dict(state)


def untrained(backbone: nn.Module) -> bool:
    """Whether a backbone still is as it was initialised: no norm of it has learned anything. False on the meta device.

    A bank of filters, which has no norms, has nothing to learn.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    weights = [norm.weight for norm in norms if norm.weight is not None]
    return bool(weights) and not any(weight.is_meta or bool((weight != 1).any()) for weight in weights)


def _read(path: Path) -> Mapping[str, Tensor]:
    absent = f"no backbone file {path}: download the checkpoint, then set backbone.weights to its path"
    state = read_state(path, absent)
    for container in _CONTAINERS:
        if isinstance(state.get(container), dict):
            state = state[container]
            break
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            # Whole models keep other parts beside their backbone.
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ValueError(f"{path} does not hold tensors by name: choose the file of a backbone")
    return state
