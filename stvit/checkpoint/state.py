"""What every layout of a state dict needs: reading containers, splitting packed projections, and a strict fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import clean_state_dict
from torch import Tensor

from core.checkpoint.fitting import CheckpointMismatch, report

State = dict[str, Tensor]

# Buffers that models compute themselves, and the counter of averages; some files carry them.
_COMPUTED = re.compile(r"(^|\.)(relative_position_index|attn_mask)$|^n_averaged$")
# Where files keep weights; averages before what they were taken of, as in timm.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# The first names of a model, in any layout, show what wrappers put in front of them.
_STAGES = re.compile(r"backbone\.(layers|stages)\.\d+\.")  # a detector's, which the layouts of Swin know
_FIRST = re.compile(r"((?:\w+\.)*?)(?:patch_embed|stem|cls_token|pos_embed|absolute_pos_embed)(?:\.|$)")


def unwrap(state: Mapping[str, object], *, bare: bool = True) -> dict[str, Tensor]:
    """The weights of a file's content under the names of a bare model.

    They are looked for in its `state_dict_ema`, `model_ema`, `state_dict` and `model`, in this order. What wrappers put
    in front of every name (`module.`, `_orig_mod.`, `model.`, `encoder.`, ...) is cut off, and buffers that models
    compute are left out. Backbones of windows keep `backbone.`, by which detectors are known.
    `bare=False` cuts off no more than timm does (`module.`, `_orig_mod.`).

    Raises:
        CheckpointMismatch: something lies beside the wrapped model.
    """
    for container in _CONTAINERS:
        if isinstance(state.get(container), Mapping):
            return unwrap(state[container], bare=bare)
    state = {n: v for n, v in clean_state_dict(dict(state)).items() if not _COMPUTED.search(n)}
    prefix = min({match[1] for name in state if (match := _FIRST.match(name))}, key=len, default="")
    while bare and prefix and not (prefix == "backbone." and any(_STAGES.match(name) for name in state)):
        outer, _, prefix = prefix.partition(".")
        beside = [name for name in state if not name.startswith(f"{outer}.")]
        if beside:
            raise CheckpointMismatch(report(f"the model lies below '{outer}.'; give that part of the file", (), beside))
        state = inside(state, f"{outer}.")
    return state


def inside(state: Mapping[str, Tensor], prefix: str) -> State:
    """Entries below `prefix`, which is cut off."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def count(state: Iterable[str], pattern: str) -> int:
    """How many different first groups of `pattern` begin the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def split_qkv(state: Mapping[str, Tensor], wanted: Iterable[str] | None = None) -> State:
    """Packed `qkv` (rows: q, k, v) as separate `q` and `kv`; with `wanted` only where that has the separate names."""
    wanted = None if wanted is None else set(wanted)
    split: State = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*attn\.|)qkv\.(weight|bias)", name)
        if match is None or (wanted is not None and f"{match[1]}q.{match[2]}" not in wanted):
            split[name] = value
            continue
        third = value.shape[0] // 3
        split[f"{match[1]}q.{match[2]}"], split[f"{match[1]}kv.{match[2]}"] = value[:third], value[third:]
    return split


def pack_qkv(state: Mapping[str, Tensor]) -> State:
    """Separate `q` and `kv` as packed `qkv`."""
    packed: State = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*attn\.)q\.(weight|bias)", name):
            packed[f"{match[1]}qkv.{match[2]}"] = torch.cat([value, state[f"{match[1]}kv.{match[2]}"]])
        elif not re.fullmatch(r".*attn\.kv\.(weight|bias)", name):
            packed[name] = value
    return packed


def resize_relative_bias(table: Tensor, window: int) -> Tensor:
    """Resample a relative position bias table `((2w-1)**2, heads)` to windows of side `window`, bicubically.

    Returns `((2*window-1)**2, heads)`, the same tensor when the side already fits.

    Raises:
        ValueError: the table does not belong to a square window.
    """
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0] or side % 2 == 0:
        raise ValueError(f"{table.shape[0]} relative positions do not belong to a square window")
    if side == 2 * window - 1:
        return table
    maps = rearrange(table, "(h w) heads -> 1 heads h w", h=side)
    maps = F.interpolate(maps, size=(2 * window - 1, 2 * window - 1), mode="bicubic", align_corners=False)
    return rearrange(maps, "1 heads h w -> (h w) heads")


def resize_tables(state: State, own: Mapping[str, Tensor]) -> State:
    """`state` with relative position tables resampled to the windows of the model that `own` belongs to."""
    fitted = dict(state)
    for name, value in state.items():
        if name.endswith("relative_position_bias_table") and name in own and len(value) != len(own[name]):
            fitted[name] = resize_relative_bias(value, (math.isqrt(len(own[name])) + 1) // 2)
    return fitted
