"""State dicts of the released code to ours and back. The names are the same; what differs is what files hold of them.

Layouts that are read, with or without the prefixes `module.` (DataParallel) and `unet.` or `network.`:

- a whole tuned network: `unet/diffusion_pytorch_model.bin` of a released folder, `pytorch_model.bin` of an accelerate
  state folder, our own;
- the trained tensors alone: `tuneavideo-<step>.pth` of the LOVEU-TGVE fork, our deltas (`target=delta`).

Whole folders are read by `TuneAVideoPipeline.from_official`. Every function is strict: which network a file is of shows
from the shapes in it, so entries that are missing or left over are errors without an experiment, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from core.checkpoint.fitting import CheckpointMismatch, fit, report
from tune_a_video.models import TRAINABLE_MODULES, TuneAVideoUNet
from tune_a_video.models.inflation import TEMPORAL_NAMES

State = dict[str, Tensor]

TARGETS = ("network", "delta")
LAYOUTS = ("official", "delta", "image")
_PREFIXES = ("module.", "unet.", "network.")
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
# What tuned tensors alone do not include, unless everything is tuned.
_WHOLE = ("conv_in.", "conv_out.", "conv_norm_out.", "time_embedding.")


def convert(state: Mapping[str, Tensor], target: nn.Module | str | None = None) -> State:
    """Translate a state dict of the released code to our names.

    Args:
        state: name to tensor.
        target: the module that is to be loaded (the network or one of its blocks); `network`, a whole network of any
            size; `delta`, some of its tensors. None: one of these, or an image network, or parts of one.

    Returns:
        A new dict with the same tensors; for a module, all of its entries.

    Raises:
        CheckpointMismatch: entries are missing, left over or of another shape.
        ValueError: unknown target.
    """
    if isinstance(target, str) and target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: use {', '.join(TARGETS)} or pass the module to be loaded")
    ours = _without_prefix(state)
    whole = target is None and any(name.startswith(_WHOLE) for name in ours)
    if isinstance(target, nn.Module):
        fit(ours, target)
    elif target == "network" or whole:
        fit(ours, network_like(ours, tuned=target == "network"))
    elif target == "delta" or any(name.startswith(_BLOCKS) for name in ours):
        _check_delta(ours)
    return ours


def _without_prefix(state: Mapping[str, Tensor]) -> State:
    ours = dict(state)
    for prefix in _PREFIXES:
        if ours and all(name.startswith(prefix) for name in ours):
            ours = {name.removeprefix(prefix): value for name, value in ours.items()}
    return ours


def network_like(state: Mapping[str, Tensor], *, tuned: bool = False) -> TuneAVideoUNet:
    """The network on the meta device whose tensors a state holds, by their names and shapes.

    Args:
        state: of a whole network, which may lack entries.
        tuned: it has temporal attention, whatever the state holds.

    Raises:
        CheckpointMismatch: the state is not of such a network.
    """
    sides: dict[str, list[list[str]]] = {}
    for side in ("down", "up"):
        number = 1 + max((int(i) for name in state for i in re.findall(rf"^{side}_blocks\.(\d+)\.", name)), default=-1)
        sides[side] = [[name for name in state if name.startswith(f"{side}_blocks.{i}.")] for i in range(number)]
    down, up = sides["down"], sides["up"]
    attended = {side: [any(".attentions." in name for name in block) for block in sides[side]] for side in sides}
    layers = [_numbers(block, r"\.resnets\.(\d+)\.") for block in down]
    depths = [_numbers(block, r"\.transformer_blocks\.(\d+)\.") or 1 for block in down]
    try:
        first = state["conv_in.weight"].shape
        widths = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(len(down))]
        text = next(value.shape[1] for name, value in state.items() if name.endswith("attn2.to_k.weight"))
        outputs = state["conv_out.weight"].shape[0]
    except (KeyError, StopIteration) as error:
        raise CheckpointMismatch(
            f"no whole network: it lacks {error or 'cross-attention (attn2.to_k.weight)'}"
        ) from None
    conv = "lora" if any("conv_temp.inner" in name for name in state) else "conv3"
    temporal = {
        "enabled": tuned or any("attn_temp" in name or "norm_temp" in name for name in state),
        "conv": conv if any("conv_temp" in name for name in state) else "none",
    }
    try:
        with torch.device("meta"):
            return TuneAVideoUNet(
                in_channels=first[1],
                out_channels=outputs,
                block_out_channels=tuple(widths),
                layers_per_block=tuple(layers),
                transformer_layers_per_block=tuple(depths),
                down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended["down"]),
                up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in attended["up"]),
                cross_attention_dim=text,
                attention_head_dim=1,
                norm_num_groups=math.gcd(*widths),
                use_linear_projection=any(n.endswith("proj_in.weight") and v.ndim == 2 for n, v in state.items()),
                temporal=temporal,
            )
    except ValueError as error:
        raise CheckpointMismatch(f"{len(down)} blocks down and {len(up)} up are no network: {error}") from None


def _numbers(names: Sequence[str], pattern: str) -> int:
    return len({found[1] for name in names if (found := re.search(pattern, name))})


def _check_delta(state: Mapping[str, Tensor]) -> None:
    """Tensors of a network, the same ones of every block in which there are any of their kind.

    Raises:
        CheckpointMismatch: entries that no network has, or that one block lacks and others have.
    """
    known = _kinds_of_names()
    layers = [re.sub(r"\.(lora_A\.weight|lora_B\.weight|alpha)$", ".weight", name) for name in state]
    strange = [name for name, layer in zip(state, layers, strict=True) if re.sub(r"\d+", "#", layer) not in known]
    kinds: dict[str, set[str]] = {}
    for name in state:
        block, inside, rest = name.rpartition(".transformer_blocks.")
        if inside:
            number, _, kind = rest.partition(".")
            kinds.setdefault(kind, set()).add(f"{block}{inside}{number}")
    blocks = set().union(*kinds.values()) if kinds else set()
    missing = sorted(f"{block}.{kind}" for kind, having in kinds.items() for block in blocks - having)
    if missing or strange:
        raise CheckpointMismatch(report("the state dict does not fit a network's tuned tensors", missing, strange))


@lru_cache(maxsize=1)
def _kinds_of_names() -> frozenset[str]:
    """Names, without their numbers, of a small network that has every kind of entry."""
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    with torch.device("meta"):  # the low-rank convolution has all names of the other
        network = TuneAVideoUNet(**sizes, **blocks, layers_per_block=1, temporal={"conv": "lora"})
    return frozenset(re.sub(r"\d+", "#", name) for name in network.state_dict())


def revert(
    state: Mapping[str, Tensor], *, layout: str = "official", modules: Sequence[str] = TRAINABLE_MODULES
) -> State:
    """Translate our state dict back.

    Args:
        state: name to tensor.
        layout: `official`, the whole network; `delta`, what the LOVEU-TGVE fork keeps, tensors of trained modules;
            `image`, the image model's tensors.
        modules: names of trained modules, for `delta`.

    Raises:
        ValueError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: use {', '.join(LAYOUTS)}")
    ours = _without_prefix(state)
    if layout == "delta":
        return {name: value for name, value in ours.items() if any(part in name for part in modules)}
    if layout == "image":
        return {name: value for name, value in ours.items() if not any(part in name for part in TEMPORAL_NAMES)}
    return ours
