"""Low-rank updates of linear layers (LoRA, Hu et al. 2021), trained in place of whole matrices.

A layer's own keys stay what they are; beside them come `lora_A.weight`, `lora_B.weight` and `alpha`, the names that
files of LoRA weights have.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PARTS = (".lora_A.weight", ".lora_B.weight", ".alpha")


class LoRALinear(nn.Linear):
    """`W x + alpha / r B A x`, with B zero at the start: the same layer.

    Args:
        linear: its parameters are shared, not copied.
        rank: r.
        alpha: of the strength.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha), device=place["device"]))
        self.strength = alpha / rank

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return F.linear(input, self.weight, self.bias) + self.strength * self.lora_B(self.lora_A(input))


def add_lora(network: nn.Module, layers: Iterable[str], rank: int, alpha: float) -> list[str]:
    """Puts low-rank updates beside the layers of those names, in place.

    Returns:
        Names of the new parameters.

    Raises:
        ValueError: a layer is not linear, or the rank no positive number.
    """
    if rank < 1:
        raise ValueError(f"lora: rank={rank}, at least 1")
    names = []
    for name in layers:
        parent_name, _, own = name.rpartition(".")
        parent, layer = network.get_submodule(parent_name), network.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"lora: {name} is a {type(layer).__name__}; only linear layers have low-rank updates")
        setattr(parent, own, LoRALinear(layer, rank, alpha))
        names += [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
    return names


def lora_buffers(network: nn.Module) -> list[str]:
    """Names of the strengths, which belong to the update as much as its matrices."""
    return [f"{name}.alpha" for name, module in network.named_modules() if isinstance(module, LoRALinear)]


def merged_copy(network: nn.Module) -> nn.Module:
    """The network with its updates added to the matrices, and no such layers; itself where there are none."""
    if not lora_buffers(network):
        return network
    made = copy.deepcopy(network)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, LoRALinear):
            parent_name, _, own = name.rpartition(".")
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            update = layer.strength * layer.lora_B.weight.detach().float() @ layer.lora_A.weight.detach().float()
            plain.weight = nn.Parameter((layer.weight.detach().float() + update).to(layer.weight.dtype))
            plain.bias = layer.bias
            setattr(made.get_submodule(parent_name), own, plain)
    return made


def merge_updates(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`state` without low-rank updates, and with the matrices of `own` that these change.

    Args:
        state: tensors by name.
        own: of the network that they are for, which has no such layers.
        source: for errors.

    Raises:
        ValueError: an update is not whole, or there is no place for it.
    """
    plain = {name: value for name, value in state.items() if not name.endswith(_PARTS)}
    for stem in sorted({name.removesuffix(part) for name in state for part in _PARTS if name.endswith(part)}):
        down, up, alpha = (state.get(stem + part) for part in _PARTS)
        weight = plain.get(f"{stem}.weight", own.get(f"{stem}.weight"))
        if down is None or up is None or weight is None or weight.shape != (len(up), down.shape[1]):
            raise ValueError(f"{source} does not fit: its low-rank update of {stem} has no place here, or lacks a part")
        strength = 1.0 if alpha is None else float(alpha) / len(down)
        update = strength * up.float() @ down.float()
        plain[f"{stem}.weight"] = (weight.float() + update.to(weight.device)).to(weight.dtype)
    return plain
