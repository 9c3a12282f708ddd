"""LoRA weights of image models merged into a video network, without further libraries.

Read are the layouts of diffusers (`unet.…to_q.lora_A.weight`, also `lora.down`, `to_q_lora.down`) and kohya's
(`lora_unet_…_to_q.lora_down.weight`), of linear layers and convolutions.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from tune_a_video.models.weights import read_tensors

_DOWN = (
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    ".lora_linear_layer.down.weight",
    ".lora_down.weight",
    ".down.weight",
)
_UP = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora.down.weight": ".lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".down.weight": ".up.weight",
}
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder"}


def merge_lora(
    unet: nn.Module, text_encoder: nn.Module | None, path: str | os.PathLike[str], scale: float = 1.0
) -> int:
    """Adds `scale * alpha / r * B A` to the weights in place.

    Args:
        unet: the network, image's or video's: the names are the same.
        text_encoder: None leaves its part of the file out.
        path: safetensors or torch file.
        scale: strength.

    Returns:
        How many layers were changed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no LoRA weights, or some of them have no place here; all are named.
    """
    state = read_tensors(path)
    networks: dict[str, Any] = {"unet": unet, "text_encoder": text_encoder}
    tables = {part: _layers(network) for part, network in networks.items() if network is not None}
    homeless, updates = [], []
    for name, down in state.items():
        suffix = next((ending for ending in _DOWN if name.endswith(ending)), None)
        if suffix is None:
            continue
        stem = name.removesuffix(suffix)
        part, layer = _place(stem)
        if networks[part] is None:
            continue
        module = tables[part].get(layer)
        up = state.get(stem + _UP[suffix])
        if module is None or up is None:
            homeless.append(name)
            continue
        alpha = state.get(f"{stem}.alpha")
        strength = scale * (1.0 if alpha is None else float(alpha) / down.shape[0])
        updates.append((name, module, strength * _product(up, down)))
    if not updates and not homeless:
        raise ValueError(f"{path} holds no LoRA weights (names end with {', '.join(_DOWN)})")
    homeless += [name for name, module, update in updates if update.numel() != module.weight.numel()]
    if homeless:
        raise ValueError(f"{path} does not fit this model: no place for {', '.join(sorted(homeless))}")
    with torch.no_grad():
        for _, module, update in updates:
            module.weight += update.view_as(module.weight).to(module.weight)
    return len(updates)


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """Layers by the name's words joined, since kohya's names have underscores for dots."""
    return {_plain(name): part for name, part in network.named_modules() if hasattr(part, "weight")}


def _plain(name: str) -> str:
    # transformers has dropped a level from the names of its text encoder.
    return re.sub(r"^text_model_", "", name.replace(".", "_"))


def _place(stem: str) -> tuple[str, str]:
    """Part of the pipeline and joined name of the layer."""
    for prefix, part in _KOHYA.items():
        if stem.startswith(prefix):
            return part, _plain(stem.removeprefix(prefix))
    part, _, rest = stem.partition(".")
    if part not in ("unet", "text_encoder"):
        part, rest = "unet", stem
    # Files of diffusers 0.12 to 0.16: `attn1.processor.to_q_lora`, and `to_out_lora` for the first layer of the output.
    rest = rest.replace(".processor.", ".")
    rest = re.sub(r"to_out_lora$", "to_out.0", rest)
    return part, _plain(re.sub(r"(to_[qkv])_lora$", r"\1", rest))


def _product(up: Tensor, down: Tensor) -> Tensor:
    """`B A` of matrices or of kernels `(out, r, 1, 1)`, `(r, in, k, k)`."""
    return up.flatten(1).float() @ down.flatten(1).float()
