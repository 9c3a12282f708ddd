"""LoRA weights of image models merged into a video network, without further libraries.

Which files are read is said in `tune_a_video.interop.lora_files`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from tune_a_video.interop.lora_files import LoRAFileError, LowRank, plain, read_lora


def merge_lora(
    unet: nn.Module, text_encoder: nn.Module | None, path: str | os.PathLike[str], scale: float = 1.0
) -> int:
    """Adds `scale * alpha / r * B A` to the weights in place, and with DoRA gives each output its magnitude again.

    Args:
        unet: the network, image's or video's: the names are the same.
        text_encoder: None leaves its part of the file out.
        path: safetensors or torch file, or PEFT's folder of an adapter.
        scale: strength of the low-rank part; 0 changes nothing.

    Returns:
        How many layers were changed.

    Raises:
        FileNotFoundError: there is no such file.
        tune_a_video.interop.lora_files.LoRAFileError: it holds no LoRA weights, weights of another kind, or some that
            have no place here; all are named. Nothing has been changed then.
    """
    tables = {"unet": _layers(unet), "text_encoder": None if text_encoder is None else _layers(text_encoder)}
    homeless, changed = [], []
    for update in read_lora(path):
        parts = [update.part] if update.part is not None else [p for p in tables if update.layer in (tables[p] or {})]
        if len(parts) == 1 and tables.get(parts[0], {}) is None:
            continue
        module = tables.get(parts[0], {}).get(update.layer) if len(parts) == 1 else None
        if module is None or not _fits(update, module):
            homeless += update.keys
        else:
            changed.append((module, update))
    if homeless:
        raise LoRAFileError(f"{path} does not fit this model: no place for {', '.join(sorted(homeless))}")
    with torch.no_grad():
        for module, update in changed if scale else ():
            module.weight.copy_(_merged(module.weight.float(), update, scale))
            if "bias" in update.tensors:
                module.bias += scale * update.strength * update.tensors["bias"].to(module.bias)
    return len(changed)


def _layers(network: nn.Module) -> dict[str, Any]:
    """Linear layers and convolutions by their joined names."""
    return {plain(name): part for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}


def _fits(update: LowRank, module: Any) -> bool:
    tensors, weight = update.tensors, module.weight
    if len(tensors["up"]) != len(weight) or update.product().shape != weight.flatten(1).shape:
        return False
    if "bias" in tensors and (module.bias is None or tensors["bias"].shape != module.bias.shape):
        return False
    return "magnitude" not in tensors or _magnitude_dim(tensors["magnitude"], update, weight) is not None


def _magnitude_dim(magnitude: Tensor, update: LowRank, weight: Tensor) -> int | None:
    """Whether magnitudes are of outputs (0) or inputs (1) of a weight `(out, in[, k, k])`; None: of neither.

    PEFT's are of outputs, `(out,)`, or `(1, out, 1, 1)` of convolutions; LyCORIS' `dora_scale` has the shape of the
    weight with ones for the dimensions that share a magnitude.
    """
    peft = any("lora_magnitude_vector" in key for key in update.keys)
    if magnitude.numel() == len(weight) and (peft or magnitude.ndim == 1 or len(magnitude) == len(weight)):
        return 0
    if not peft and magnitude.ndim > 1 and magnitude.numel() == magnitude.shape[1] == weight.shape[1]:
        return 1
    return None


def _merged(weight: Tensor, update: LowRank, scale: float) -> Tensor:
    merged = weight + scale * update.product().view_as(weight).to(weight.device)
    magnitude = update.tensors.get("magnitude")
    if magnitude is None:
        return merged
    dim = _magnitude_dim(magnitude, update, weight)
    others = [i for i in range(weight.ndim) if i != dim]
    shape = [-1 if i == dim else 1 for i in range(weight.ndim)]
    length = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    return merged * (magnitude.float().to(weight.device).view(shape) / length.clamp_min(1e-12))
