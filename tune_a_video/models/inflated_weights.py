"""What a video network takes over from the one it is made of: its options, and tensors beside the new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tune_a_video.models.frame_attention import check_spec
from tune_a_video.models.inflation import TEMPORAL_NAMES
from tune_a_video.models.temporal import TemporalConfig


def settled_options(
    config: Mapping[str, Any], options: Mapping[str, Any], source: str, *, tuned: bool = False
) -> dict[str, Any]:
    """`attention`, `group_norm` and `temporal` of a network that is made from another one.

    Args:
        config: of the other one. A video network's says all three; one of the released code says none.
        options: what is asked for; None: what the other one has, or the default over an image network.
        source: the other one, for the error.
        tuned: it is a video network, whatever its configuration says.

    Raises:
        ValueError: weights that were tuned with one thing are asked to go on with another.
    """
    defaults = {"attention": "first_prev", "group_norm": "joint", "temporal": None}
    tuned = tuned or "temporal" in config
    settled = {}
    for name, default in defaults.items():
        own, asked = config.get(name, default) if tuned else default, options.get(name)
        if tuned and asked is not None and _comparable(name, asked) != _comparable(name, own):
            raise ValueError(
                f"{source} was tuned with {name}={_comparable(name, own)!r}, but {_comparable(name, asked)!r} is asked "
                f"for: leave {name} out to take its own"
            )
        settled[name] = own if asked is None else asked
    return settled


def _comparable(name: str, value: Any) -> Any:
    """An option as it decides what a tuned network computes: how it was initialised does not."""
    if name == "attention":
        return json.loads(json.dumps(check_spec(value)))
    if name == "temporal":
        return {key: one for key, one in vars(TemporalConfig.of(value)).items() if key != "zero_init"}
    return value


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors in a precision; None: float32."""
    return {name: value.to(dtype or torch.float32) for name, value in state.items()}


def fresh_temporal(skeleton: Any, like: Tensor) -> dict[str, Tensor]:
    """Initial temporal tensors for a network that has no memory yet, as their constructors would make them."""
    fresh: dict[str, Tensor] = {}
    zero_init = skeleton.config["temporal"]["zero_init"]
    for name, value in skeleton.state_dict().items():
        if not any(part in name for part in TEMPORAL_NAMES):
            continue
        made = torch.empty(value.shape, device=like.device, dtype=torch.float32)
        bias = name.endswith(".bias")
        if "norm_temp" in name:
            nn.init.constant_(made, 0.0 if bias else 1.0)
        elif "conv_temp.outer" in name:
            nn.init.zeros_(made)
        elif "conv_temp" in name:
            fan_in = skeleton.get_parameter(name.replace(".bias", ".weight")).shape[1:].numel()
            nn.init.uniform_(made, -(fan_in**-0.5), fan_in**-0.5)
        elif "to_out.0" in name and (zero_init == "weight_and_bias" or (zero_init == "weight_only" and not bias)):
            nn.init.zeros_(made)
        else:
            # The bias of torch.nn.Linear goes by the number of inputs, which here is that of outputs.
            nn.init.uniform_(made, -(value.shape[-1] ** -0.5), value.shape[-1] ** -0.5)
        fresh[name] = made.to(like.dtype)
    return fresh


def load(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Gives a network without memory the tensors of a state.

    Raises:
        ValueError: they do not fit; the message names them and `source`.
    """
    own = network.state_dict()
    lacking = sorted(own.keys() - state.keys())
    strange = sorted(state.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if lacking or strange or shapes:
        raise ValueError(
            f"{source} does not fit the video network: missing {lacking or 'nothing'}, "
            f"unexpected {strange or 'nothing'}, of another shape {shapes or 'nothing'}"
        )
    network.load_state_dict(state, assign=True)
