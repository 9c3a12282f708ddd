"""Delta files: a tuned network as what differs from its backbone, and back (section 9).

A file holds every tensor that was trained (of an earlier stage, too), the channels' indices and other buffers of the
method, buffers of the backbone that training changed, the head, the method with its arguments, and which backbone they
belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petl.checkpoint.packing import DeltaError, read_packed, write_packed
from petl.models.inject import PetlModel, buffer_digest, inject
from petl.models.methods import METHODS, Method, Together

KIND = "petl.delta"


def method_config(method: Method) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The method as plain values, and its channels as tensors; the values say how many of them every block has."""
    config, tensors = method.config(), {}
    if isinstance(method, Together):
        config["methods"] = []
        for index, inner in enumerate(method.methods):
            plain, channels = method_config(inner)
            config["methods"].append(plain)
            tensors |= {f"{index}.{name}": value for name, value in channels.items()}
    elif config.get("channels") is not None:
        flat: list[int] = []
        layout: list[Any] = []
        for block in config["channels"]:
            parts = block if isinstance(block, Mapping) else {"": block}
            for indices in parts.values():
                flat += indices
            counts = {part: len(indices) for part, indices in parts.items()}
            layout.append(counts if isinstance(block, Mapping) else counts[""])
        config["channels"], tensors["channels"] = layout, torch.tensor(flat, dtype=torch.long)
    return config, tensors


def build_method(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Method:
    """A method from `method_config`.

    Raises:
        DeltaError: an unknown method or argument.
    """
    arguments = {key: value for key, value in config.items() if key != "method"}
    name = config.get("method")
    if name not in METHODS:
        raise DeltaError(f"the method '{name}' is none of {sorted(METHODS)}")
    if "methods" in arguments:
        inner = [
            build_method(plain, {key.partition(".")[2]: v for key, v in tensors.items() if key.startswith(f"{index}.")})
            for index, plain in enumerate(arguments["methods"])
        ]
        arguments["methods"] = inner
    if arguments.get("channels") is not None:
        flat = iter(tensors["channels"].tolist())
        arguments["channels"] = [
            {part: [next(flat) for _ in range(count)] for part, count in block.items()}
            if isinstance(block, Mapping)
            else [next(flat) for _ in range(block)]
            for block in arguments["channels"]
        ]
    try:
        return METHODS[name](**arguments)
    except TypeError as error:
        raise DeltaError(f"the method {name} cannot be built: {error}") from error


def backbone_identity(model: PetlModel) -> dict[str, Any]:
    """What the backbone is: its class, timm's name where it has one, and a hash of all that no stage has changed."""
    backbone = model.backbone
    config = getattr(backbone, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    changed = set(model.delta_names())
    digest, count = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.") and name not in changed and not model.in_head(name):
            value = parameter.detach().float().cpu().contiguous()
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
            count += value.numel()
    return {
        "class": type(backbone).__name__,
        "architecture": architecture or "",
        "frozen": count,
        "hash": digest.hexdigest()[:32] if count else "",
    }


def delta_state(model: PetlModel) -> dict[str, Tensor]:
    """Every tensor of a delta file by its name in the model; indices of channels are kept with the method instead."""
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {name: parameters[name] for name in model.delta_names()}
    for name, value in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        if leaf in model.get_submodule(parent)._non_persistent_buffers_set or leaf == "channels":
            continue
        if name.startswith("tuning.") or model.initial_buffers.get(name) != buffer_digest(value):
            state[name] = value
    return state


def save_delta(model: PetlModel, path: str | Path, **origin: Any) -> Path:
    """Writes a delta file.

    Args:
        model: from `petl.inject`, trained.
        path: ends in ``.safetensors``.
        origin: further plain values for the header, e.g. the task and its data.

    Raises:
        DeltaError: another suffix, or channels that were never chosen.
    """
    if not model.chosen:
        raise DeltaError("this model's channels were never chosen: there is nothing worth keeping")
    config, channels = method_config(model.method)
    names = model.delta_names()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    header = {
        "method": config,
        "backbone": backbone_identity(model),
        "num_classes": getattr(model.backbone.get_classifier(), "out_features", None),
        "trained": "all" if trained == set(names) else [index for index, name in enumerate(names) if name in trained],
        "frozen_mode": model.frozen_mode,
        "origin": origin,
    }
    tensors = {**{f"method.{name}": value for name, value in channels.items()}, **delta_state(model)}
    write_packed(path, tensors, header, KIND)
    return Path(path)


def read_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a delta file by name, and its header.

    Raises:
        DeltaError: no such file, or another one.
    """
    return read_packed(path, KIND)


def load_delta(model: nn.Module, path: str | Path, *, trainable: bool = True) -> PetlModel:
    """Puts a delta file onto its backbone.

    Args:
        model: a plain network of timm with the weights of the backbone, which is changed in place; or a `PetlModel` of
            the same method.
        path: from `save_delta`.
        trainable: the parameters that were trained ask for gradients again; else the network is frozen throughout.

    Raises:
        DeltaError: another backbone, other weights, or another method; the message says which.
    """
    tensors, header = read_delta(path)
    channels = {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
    state = {name: value for name, value in tensors.items() if not name.startswith("method.")}
    if not isinstance(model, PetlModel):
        method = build_method(header["method"], channels)
        model = inject(model, method, num_classes=header["num_classes"], frozen_mode=header["frozen_mode"])
    else:
        own, chosen = method_config(model.method)
        if own != header["method"] or any(not torch.equal(chosen[name], value) for name, value in channels.items()):
            raise DeltaError(f"'{path}' holds {header['method']}, the model has {own}, or other channels")
    _same_backbone(path, header["backbone"], backbone_identity(model))
    own_tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    needed = set(model.delta_names())
    missing, surplus = sorted(needed - state.keys()), sorted(state.keys() - own_tensors.keys())
    if missing or surplus:
        raise DeltaError(f"'{path}' does not fit: missing {missing[:5]}, not in the model {surplus[:5]}")
    for name, value in state.items():
        if own_tensors[name].shape != value.shape:
            raise DeltaError(f"'{path}': {name} is {tuple(value.shape)}, the model's {tuple(own_tensors[name].shape)}")
    with torch.no_grad():
        for name, value in state.items():
            own_tensors[name].copy_(value)
    names = model.delta_names()
    wanted = set(names if header["trained"] == "all" else [names[index] for index in header["trained"]])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and name in wanted)
    return model


def _same_backbone(path: str | Path, want: Mapping[str, Any], have: Mapping[str, Any]) -> None:
    if want["class"] != have["class"] or want["frozen"] != have["frozen"]:
        raise DeltaError(
            f"'{path}' belongs to a {want['class']} {want['architecture']} with {want['frozen']:,} frozen numbers; "
            f"this is a {have['class']} {have['architecture']} with {have['frozen']:,}"
        )
    if want["hash"] != have["hash"]:
        raise DeltaError(
            f"'{path}' was trained on other weights of {want['architecture'] or want['class']} (hash {want['hash']}, "
            f"these have {have['hash']}): load the same pre-trained weights first"
        )
