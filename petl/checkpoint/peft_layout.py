"""LoRA and LayerNorm deltas in the layout of HF peft, whose own loader reads them (section 11)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.checkpoint import save_atomic, write_text_atomic
from petl.checkpoint.packing import DeltaError
from petl.models.inject import PetlModel
from petl.models.methods import LNTune, LoRA
from petl.models.methods.lowrank import LowRank

_PREFIX = "base_model.model."


def export_peft(model: PetlModel, folder: str | Path, *, base: str = "") -> Path:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``, for ``peft.PeftModel.from_pretrained``.

    The base model is the plain network of timm with the same head; the head's weights are in the file as
    `modules_to_save`. Parts of a packed qkv, each with matrices of its own, become one pair of the joint rank, which is
    the same map.

    Args:
        model: with `LoRA` or `LNTune`.
        folder: is made where it is missing.
        base: name or path of the base model, for the config.

    Raises:
        DeltaError: another method, layers of different ranks, or LayerNorms of which only scale or shift is tuned.
    """
    folder = Path(folder)
    method = model.method
    if isinstance(method, LoRA):
        state, config = _lora(model)
    elif isinstance(method, LNTune):
        state, config = _norms(model, method)
    else:
        raise DeltaError(f"peft has no {type(method).__name__} for these networks: only LoRA and LNTune are exported")
    for name, value in model.named_parameters():
        if model.in_head(name):
            state[_PREFIX + name.removeprefix("backbone.")] = value
    config |= {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": [model.head_name],
        "task_type": None,
    }
    save_atomic(
        {name: value.detach().contiguous() for name, value in state.items()}, folder / "adapter_model.safetensors"
    )
    write_text_atomic(json.dumps(config, indent=2) + "\n", folder / "adapter_config.json")
    return folder


def _places(model: PetlModel) -> dict[str, nn.Module]:
    """The tuning modules by the dotted name of the layer that they are in."""
    names = {name.replace(".", "_"): name for name, _ in model.backbone.named_modules()}
    return {names[key]: module for key, module in model.tuning.items()}


def _lora(model: PetlModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, module in _places(model).items():
        assert isinstance(module, LowRank)
        rank = len(module.down)
        state[f"{_PREFIX}{name}.lora_A.weight"] = module.down
        state[f"{_PREFIX}{name}.lora_B.weight"] = module.spread_up().detach().clone()
        ranks[name], alphas[name] = rank, module.scale * rank
    first = next(iter(ranks))
    config = {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return state, config


def _norms(model: PetlModel, method: LNTune) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if method.tune != "norm":
        raise DeltaError(f"peft's ln_tuning holds scale and shift of every norm, this model tunes {method.tune} alone")
    state: dict[str, Tensor] = {}
    names = []
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.LayerNorm) and isinstance(module.weight, nn.Parameter) and module.weight.requires_grad:
            names.append(name)
            for leaf, value in module.named_parameters(recurse=False):
                state[f"{_PREFIX}{name}.ln_tuning_layers.{leaf}"] = value
    # A pattern of whole names: peft takes a list for endings, and "norm" is also an identity's in timm's attention.
    return state, {"peft_type": "LN_TUNING", "target_modules": "|".join(map(re.escape, names))}
