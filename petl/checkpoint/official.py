"""Weights of others in our names: Flax and timm backbones, tuned networks of the baselines' authors (section 9).

Layouts that are read, recognised by their names: the 2020 ImageNet-21k release (`.npz`, Flax), timm's ViT, Swin and
ConvNeXt, and the state dicts of SCT, NOAH, SSF, FacT, Convpass, RepAdapter and VPT above timm's ViT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import VitrineError
from petl.models.inject import PetlModel

State = dict[str, Tensor]

# Entries of published files that have no place in ours, with the reason (for `tools/convert.py`).
DROPPED = {
    "pre_logits.*": "a tanh layer of the pre-training, which transfer leaves out",
    "head.*": "the classifier of the pre-training",
    "head_dist.*": "the second classifier of a distilled network",
    "pre_logits/*": "a tanh layer of the pre-training, which transfer leaves out",
    "head/*": "the classifier of the pre-training",
    "visual_prompt_token": "NOAH's prompts of the model itself, which its first block takes out before any attention",
}

_BLOCK = r"blocks\.(\d+)\."
# Names of the baselines' authors -> places of ours; what is in brackets is the block's number.
_RENAMED: list[tuple[str, str]] = [
    (_BLOCK + r"adapter_module\.adapter_downsample\.(.*)", r"tuning.blocks_\1_mlp.down.\2"),
    (_BLOCK + r"adapter_module\.adapter_upsample\.(.*)", r"tuning.blocks_\1_mlp.up.\2"),
    (_BLOCK + r"adaptmlp\.adapter_layer_norm_before\.(.*)", r"tuning.blocks_\1_mlp.norm.\2"),
    (_BLOCK + r"adaptmlp\.(down|up)_proj\.(.*)", r"tuning.blocks_\1_mlp.\2.\3"),
    (_BLOCK + r"adapter_(attn|mlp)\.adapter_(conv|down|up)\.(.*)", r"tuning.blocks_\1_\2.\3.\4"),
    (_BLOCK + r"adapter_(attn|mlp)\.conv_A\.(.*)", r"tuning.blocks_\1_\2.down.\3"),
    (_BLOCK + r"adapter_(attn|mlp)\.conv_B\.(.*)", r"tuning.blocks_\1_\2.up.\3"),
    (_BLOCK + r"adapter\.ln1\.(.*)", r"tuning.blocks_\1_mlp.down.\2"),
    (_BLOCK + r"adapter\.ln2\.(.*)", r"tuning.blocks_\1_mlp.up.\2"),
    (_BLOCK + r"attn\.LoRA_a\.weight", r"tuning.blocks_\1_attn_qkv.down"),
    (_BLOCK + r"attn\.LoRA_b\.weight", r"tuning.blocks_\1_attn_qkv.up"),
    (_BLOCK + r"visual_prompt_token", r"tuning.blocks_\1.prompts"),
    (_BLOCK + r"attn\.proj_FacTs\.weight", r"tuning.blocks_\1_attn_proj.sigma"),
    (_BLOCK + r"mlp\.(fc[12])_FacTs\.weight", r"tuning.blocks_\1_mlp_\2.sigma"),
    (_BLOCK + r"sct_attn\.adapt_linear\.(.*)", r"tuning.blocks_\1_attn.tuning.update.\2"),
    (_BLOCK + r"sct_mlp\.adapt_linear\.(.*)", r"tuning.blocks_\1_mlp.tuning.update.\2"),
    (_BLOCK + r"attn\.q_l\.(.*)", r"tuning.blocks_\1_qv.query.update.\2"),
    (_BLOCK + r"attn\.v_l\.(.*)", r"tuning.blocks_\1_qv.value.update.\2"),
    (r"FacTu\.weight", "tuning.factors.down.weight"),
    (r"FacTv\.weight", "tuning.factors.up.weight"),
    (r"FacTc", "tuning.factors.core"),
    (r"FacTp", "tuning.factors.columns"),
]
# SSF: module and number -> the place behind which it is.
_SSF = {
    ("", "1"): "norm",
    ("patch_embed.", "1"): "patch_embed_proj",
    ("patch_embed.", "2"): "patch_embed_norm",
    ("block", "1"): "norm1",
    ("block", "2"): "norm2",
    ("attn.", "1"): "attn_qkv",
    ("attn.", "2"): "attn_proj",
    ("mlp.", "1"): "mlp_fc1",
    ("mlp.", "2"): "mlp_fc2",
}


class CheckpointMismatch(VitrineError, ValueError):
    """A state dict does not fit: the message lists every missing, unexpected and misshapen entry."""


def convert(state: Mapping[str, Tensor], target: nn.Module | str | None = None) -> State:
    """Translates a state dict to our names.

    Args:
        state: name to tensor.
        target: the module that is to be loaded: a `PetlModel`, which may be smaller than a NOAH supernet whose weights
            are given, or a plain backbone; None or "backbone": a plain backbone.

    Raises:
        CheckpointMismatch: an entry is left over, missing, or of another shape.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.endswith("embedding/kernel") for name in state):
        state = from_flax(state)
    tuned = isinstance(target, PetlModel)
    ours: State = {}
    for name, value in state.items():
        if _dropped(name, tuned, state):
            continue
        new = _tuning_name(name)
        if new is not None:
            ours[new] = value
        elif not _joined(name):
            ours[f"backbone.{name}" if tuned else name] = value
    _join_lora(state, ours)
    _join_fact(state, ours)
    _split_prompts(state, ours)
    return ours if target is None or isinstance(target, str) else _fitted(ours, target)


def _dropped(name: str, tuned: bool, state: Mapping[str, Tensor]) -> bool:
    if name.startswith(("pre_logits.", "head_dist.")):
        return True
    if name == "visual_prompt_token":
        return True
    return not tuned and name.startswith("head.")


def _tuning_name(name: str) -> str | None:
    for pattern, ours in _RENAMED:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    if found := re.fullmatch(r"(blocks\.\d+\.)?(.*?)ssf_(scale|shift)_(\d)", name):
        block, owner, kind, number = found.groups()
        place = _SSF.get((owner or ("block" if block else ""), number))
        if place is not None:
            prefix = f"{block.replace('.', '_')}" if block else ""
            return f"tuning.{prefix}{place}.{kind}"
    return None


_LORA = re.compile(_BLOCK + r"attn\.linear_([ab])_([qkv])\.weight")
_QKV = re.compile(_BLOCK + r"attn\.([qkv])_FacTs\.weight")


def _joined(name: str) -> bool:
    """Whether several entries of the file are one of ours."""
    return bool(_LORA.fullmatch(name) or _QKV.fullmatch(name)) or name == "prompt_embeddings"


def _join_lora(state: Mapping[str, Tensor], ours: State) -> None:
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := _LORA.fullmatch(name):
            blocks.setdefault(found[1], {})[found[2] + found[3]] = value
    for block, parts in blocks.items():
        order = [part for part in "qkv" if f"a{part}" in parts]
        ours[f"tuning.blocks_{block}_attn_qkv.down"] = torch.cat([parts[f"a{part}"] for part in order])
        ours[f"tuning.blocks_{block}_attn_qkv.up"] = torch.stack([parts[f"b{part}"] for part in order])


def _join_fact(state: Mapping[str, Tensor], ours: State) -> None:
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := _QKV.fullmatch(name):
            blocks.setdefault(found[1], {})[found[2]] = value
    for block, parts in blocks.items():
        ours[f"tuning.blocks_{block}_attn_qkv.sigma"] = torch.cat([parts[part] for part in "qkv"])


def _split_prompts(state: Mapping[str, Tensor], ours: State) -> None:
    if "prompt_embeddings" in state:
        for index, prompts in enumerate(state["prompt_embeddings"]):
            ours[f"tuning.blocks_{index}.prompts"] = prompts


def _fitted(ours: State, target: nn.Module) -> State:
    """The entries in the target's shapes: kernels of one pixel as matrices, a supernet's first rows and columns."""
    own = target.state_dict()
    unexpected = sorted(ours.keys() - own.keys())
    # A supernet holds modules of blocks in which the subnet has none.
    for name in [n for n in unexpected if isinstance(target, PetlModel) and _of_supernet(n, target)]:
        unexpected.remove(name)
        del ours[name]
    missing = sorted(name for name in own.keys() - ours.keys() if not name.endswith((".channels",)))
    missing = [name for name in missing if not _is_head(name, target)]
    wrong = []
    for name, value in list(ours.items()):
        if name not in own:
            continue
        shape = own[name].shape
        if _same_axes(value.shape, shape):
            value = value.reshape(shape)
        if value.shape != shape and isinstance(target, PetlModel) and _of_subnet(name, target):
            value = value.reshape(value.shape[-len(shape) :]) if value.ndim > len(shape) else value
            value = value.unsqueeze(0) if value.ndim < len(shape) else value
            value = value[tuple(slice(size) for size in shape)]
        if value.shape != shape:
            wrong.append(f"{name} {tuple(value.shape)}, ours {tuple(shape)}")
        ours[name] = value
    if unexpected or missing or wrong:
        raise CheckpointMismatch(f"unexpected: {unexpected}; missing: {missing}; of another shape: {wrong}")
    return ours


def _same_axes(given: torch.Size, wanted: torch.Size) -> bool:
    """Whether two shapes are the same but for axes of length one."""
    return [n for n in given if n != 1] == [n for n in wanted if n != 1]


def _is_head(name: str, target: nn.Module) -> bool:
    return target.in_head(name) if isinstance(target, PetlModel) else name.startswith("head.")


def _subnet(target: PetlModel) -> Any:
    from petl.models.methods import NOAHSubnet

    return target.method if isinstance(target.method, NOAHSubnet) else None


def _of_subnet(name: str, target: PetlModel) -> bool:
    return _subnet(target) is not None and name.startswith("tuning.")


def _of_supernet(name: str, target: PetlModel) -> bool:
    return _of_subnet(name, target)


# ------------------------------------------------------------------ Flax
_FLAX_TOP = {
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "cls": "cls_token",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
}
_FLAX_BLOCK = {
    "LayerNorm_0/scale": "norm1.weight",
    "LayerNorm_0/bias": "norm1.bias",
    "LayerNorm_2/scale": "norm2.weight",
    "LayerNorm_2/bias": "norm2.bias",
    "MultiHeadDotProductAttention_1/out/kernel": "attn.proj.weight",
    "MultiHeadDotProductAttention_1/out/bias": "attn.proj.bias",
    "MlpBlock_3/Dense_0/kernel": "mlp.fc1.weight",
    "MlpBlock_3/Dense_0/bias": "mlp.fc1.bias",
    "MlpBlock_3/Dense_1/kernel": "mlp.fc2.weight",
    "MlpBlock_3/Dense_1/bias": "mlp.fc2.bias",
}
_ENCODER = "Transformer/encoderblock_"


def from_flax(state: Mapping[str, Tensor]) -> State:
    """The names and layouts of Google's `.npz` files as timm's; `pre_logits/*` and `head/*` are left out.

    Raises:
        CheckpointMismatch: an entry that no ViT of these releases has, or a missing part of a qkv.
    """
    prefix = next((p for p in ("opt/target/", "params/", "") if f"{p}embedding/kernel" in state), "")
    ours: State = {}
    packed: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for full, value in state.items():
        name = full.removeprefix(prefix)
        if name.startswith(("pre_logits/", "head/")) or (prefix and not full.startswith(prefix)):
            continue
        if name in _FLAX_TOP:
            ours[_FLAX_TOP[name]] = value.permute(3, 2, 0, 1) if name == "embedding/kernel" else value
            continue
        block, _, part = name.removeprefix(_ENCODER).partition("/")
        found = re.fullmatch(r"MultiHeadDotProductAttention_1/(query|key|value)/(kernel|bias)", part)
        if name.startswith(_ENCODER) and found:
            packed.setdefault(f"{block}.{found[2]}", {})[found[1]] = value
        elif name.startswith(_ENCODER) and part in _FLAX_BLOCK:
            if part.endswith("out/kernel"):
                value = value.flatten(0, 1).T  # (heads, width, C)
            elif part.endswith("kernel"):
                value = value.T
            ours[f"blocks.{block}.{_FLAX_BLOCK[part]}"] = value
        else:
            unexpected.append(full)
    for place, parts in packed.items():
        if len(parts) < 3:
            raise CheckpointMismatch(f"block {place}: of query, key and value there is only {sorted(parts)}")
        block, _, kind = place.partition(".")
        tensors = [parts[part] for part in ("query", "key", "value")]
        if kind == "kernel":  # (C, heads, width)
            ours[f"blocks.{block}.attn.qkv.weight"] = torch.cat([t.flatten(1).T for t in tensors])
        else:
            ours[f"blocks.{block}.attn.qkv.bias"] = torch.cat([t.flatten() for t in tensors])
    if unexpected:
        raise CheckpointMismatch(f"no ViT of these releases has {sorted(unexpected)}")
    return {name: value.contiguous() for name, value in ours.items()}


def resize_positions(state: State, model: nn.Module) -> State:
    """The table of positions at the model's grid: bicubic, without antialiasing, the prefix tokens' rows kept.

    Returns:
        A copy of `state` (timm's names) whose `pos_embed` fits the model; `state` itself where it does already.
    """
    table = state.get("pos_embed")
    if table is None or table.shape == model.pos_embed.shape:
        return dict(state)
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    new = resample_abs_pos_embed(
        table, list(model.patch_embed.grid_size), num_prefix_tokens=prefix, antialias=False, interpolation="bicubic"
    )
    return {**state, "pos_embed": new}
