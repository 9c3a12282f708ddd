"""Files of LoRA weights as others write them, read into one form; what cannot be applied rightly is refused by name.

Read are

- diffusers' (`pytorch_lora_weights.safetensors`): `unet.…to_q.lora_A.weight`, and the older `…to_q.lora.down.weight`,
  `…attn1.processor.to_q_lora.down.weight`, `text_encoder.…q_proj.lora_linear_layer.down.weight`; alphas as keys, or in
  the file's metadata (`lora_adapter_metadata`);
- PEFT's folder of an adapter: `adapter_model.safetensors` with `adapter_config.json`, which has alphas, patterns of
  them and `use_rslora`;
- kohya's (`lora_unet_…_to_q.lora_down.weight` with `.alpha`), also of convolutions, with `lora_mid`;

each with or without DoRA's magnitudes (`lora_magnitude_vector`, `dora_scale`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_a_video.models.weights import read_json, read_tensors

_WEIGHTS = ("adapter_model", "pytorch_lora_weights")
_CONFIG = "adapter_config.json"
# What a key's end says; the rest of it names the layer.
_ENDS = (
    (r"\.lora_A(?:\.(?P<adapter>[^.]+))?\.weight", "down"),
    (r"\.lora_B(?:\.(?P<adapter>[^.]+))?\.weight", "up"),
    (r"\.lora_B(?:\.(?P<adapter>[^.]+))?\.bias", "bias"),
    (r"\.(?:lora\.|lora_linear_layer\.|lora_|)(?P<role>down|up|mid)\.weight", None),
    (r"\.alpha", "alpha"),
    (r"\.(?:dora_scale|lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?)", "magnitude"),
)
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_PARTS = ("unet", "text_encoder", "text_encoder_2", "transformer")
# Ways of PEFT to start that change the model's own weights too: an update alone is not what was trained.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


class LoRAFileError(ValueError):
    """A file of LoRA weights that is none, or that cannot be applied as it was meant."""


@dataclass
class LowRank:
    """The update of one layer.

    part: `unet` or `text_encoder`; None: whichever has the layer.
    layer: its name, words joined by underscores, since kohya's names have no dots.
    name: its name as the file has it.
    keys: of the file.
    tensors: `down` `(r, in[, k, k])`, `up` `(out, r[, 1, 1])`, and perhaps `mid` `(r, r, k, k)`, `magnitude`, `bias`.
    strength: of the product: alpha / r, or what else the file says.
    """

    part: str | None
    layer: str
    name: str
    keys: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    strength: float = 1.0

    def product(self) -> Tensor:
        """`strength * B A` as a matrix `(out, in * k * k)`, in float32."""
        down, up, mid = self.tensors["down"].float(), self.tensors["up"].float(), self.tensors.get("mid")
        if mid is None:
            return self.strength * (up.flatten(1) @ down.flatten(1))
        kernel = torch.einsum("or,rskl,si->oikl", up.flatten(1), mid.float(), down.flatten(1))
        return self.strength * kernel.flatten(1)


def plain(name: str) -> str:
    """A layer's name with its words joined; transformers has dropped a level from the names of its text encoder."""
    return re.sub(r"^text_model_", "", name.replace(".", "_"))


def read_lora(path: str | os.PathLike[str]) -> list[LowRank]:
    """All updates of a file, or of PEFT's or diffusers' folder of one.

    Raises:
        FileNotFoundError: there is no such file, or none of that name in the folder.
        LoRAFileError: it holds no LoRA weights, some that are not whole, or another kind (all are named).
    """
    path = _weights_file(Path(path))
    state = read_tensors(path)
    updates: dict[tuple[str | None, str], LowRank] = {}
    adapters, strange = set(), []
    for key, value in state.items():
        found = next(((m, role) for end, role in _ENDS if (m := re.search(end + "$", key))), None)
        if found is None:
            strange.append(key)
            continue
        end, role = found
        role = role or end["role"]
        part, name = _place(key[: end.start()])
        update = updates.setdefault((part, plain(name)), LowRank(part, plain(name), name))
        adapters.add(end.groupdict().get("adapter"))
        update.keys.append(key)
        if role in update.tensors:
            strange.append(key)
        update.tensors[role] = value
    if not any("down" in update.tensors for update in updates.values()):
        raise LoRAFileError(f"{path} holds no LoRA weights (names end with .lora_A.weight, .lora_down.weight, ...)")
    if strange or len(adapters - {None}) > 1:
        names = [f"adapters {', '.join(sorted(adapters - {None}))}"] if len(adapters - {None}) > 1 else []
        raise LoRAFileError(
            f"{path} holds more than LoRA's updates of layers, which would be lost: "
            f"{', '.join(names + sorted(strange)[:8])}. Only low-rank updates of one adapter, their alphas, biases and "
            "magnitudes (DoRA) can be merged"
        )
    halves = [key for one in updates.values() if not {"down", "up"} <= one.tensors.keys() for key in one.keys]
    if halves:
        raise LoRAFileError(f"{path} is not whole: there is no other half to {', '.join(sorted(halves)[:8])}")
    settings = _settings(path)
    for update in updates.values():
        update.strength = _strength(update, settings, path)
    return list(updates.values())


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = [f"{stem}{suffix}" for stem in _WEIGHTS for suffix in (".safetensors", ".bin")]
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no LoRA weights in {path}: looked for {', '.join(names)}")
    return file


def _place(stem: str) -> tuple[str | None, str]:
    """Part of the pipeline, and the layer's name there."""
    part: str | None = "unet"
    for prefix, owner in _PREFIXES.items():
        if stem.startswith(prefix):
            return owner, stem.removeprefix(prefix)
    first, _, rest = stem.partition(".")
    if first in _PARTS:
        part = first
    elif stem.startswith("base_model.model."):
        part, rest = None, stem.removeprefix("base_model.model.")
    else:
        rest = stem
    # Files of diffusers 0.12 to 0.16: `attn1.processor.to_q_lora`, and `to_out_lora` for the first layer of the output;
    # they name the text encoder's layers as the network's.
    rest = rest.replace(".processor.", ".")
    old = re.fullmatch(r"(.*\.)to_(q|k|v|out)(?:_lora)?", rest)
    if old is not None and part == "text_encoder":
        return part, f"{old[1]}{old[2]}_proj"
    if old is not None:
        return part, f"{old[1]}to_{old[2]}" + (".0" if old[2] == "out" else "")
    return part, rest


# ------------------------------------------------------------------ strengths
def _settings(path: Path) -> dict[str, Any]:
    """What a file says beside its tensors: `adapter` by part (None: PEFT's), `alpha` and `dim` of kohya's."""
    found: dict[str, Any] = {"adapter": {}}
    config = path.parent / _CONFIG
    if path.stem == _WEIGHTS[0] and config.is_file():
        found["adapter"][None] = read_json(config)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        try:
            packed = json.loads(metadata.get("lora_adapter_metadata") or "{}")
        except ValueError as error:
            raise LoRAFileError(f"{path}: its lora_adapter_metadata is not JSON ({error})") from error
        for key, value in packed.items():
            part, _, name = key.partition(".")
            found["adapter"].setdefault(part, {})[name] = value
        with_numbers = {name: metadata.get(f"ss_network_{name}") for name in ("alpha", "dim")}
        found |= {name: float(value) for name, value in with_numbers.items() if value not in (None, "None")}
    for settings in found["adapter"].values():
        _check_adapter(settings, path)
    return found


def _check_adapter(settings: Mapping[str, Any], path: Path) -> None:
    start = settings.get("init_lora_weights")
    unknown = {
        "peft_type": settings.get("peft_type", "LORA") not in ("LORA", None),
        "fan_in_fan_out": bool(settings.get("fan_in_fan_out")),
        "layer_replication": bool(settings.get("layer_replication")),
        "use_qalora": bool(settings.get("use_qalora")),
        "init_lora_weights": isinstance(start, str) and start.lower().startswith(_CHANGED_BASE),
    }
    for name, refused in unknown.items():
        if refused:
            raise LoRAFileError(f"{path}: {name}={settings[name]!r}: a low-rank update alone is not what was trained")


def _strength(update: LowRank, settings: Mapping[str, Any], path: Path) -> float:
    rank = update.tensors["down"].shape[0]
    adapter = settings["adapter"].get(update.part, settings["adapter"].get(None))
    if adapter is not None and adapter.get("use_dora") and "magnitude" not in update.tensors:
        raise LoRAFileError(f"{path}: use_dora, but {update.name} has no magnitudes")
    if "alpha" in update.tensors:
        alpha = float(update.tensors["alpha"])
    elif adapter is not None and adapter.get("lora_alpha") is not None:
        patterns = dict(adapter.get("alpha_pattern") or {})
        own = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", update.name)), None)
        alpha = float(adapter["lora_alpha"] if own is None else patterns[own])
    elif update.keys[0].startswith("lora_") and settings.get("dim") == rank and "alpha" in settings:
        alpha = settings["alpha"]
    else:
        alpha = float(rank)
    return alpha / (math.sqrt(rank) if adapter is not None and adapter.get("use_rslora") else rank)
