"""Tensors that FSDP2 spreads over processes (DTensor), as whole tensors and back.

Training state is saved whole, so that a checkpoint does not depend on how many processes wrote it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is spread over processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; enough for whatever is done element by element."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor: gathered from all processes (every one must call this) and kept on the CPU when it was spread,
    because the parts were spread to save device memory; otherwise `tensor` itself."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """`tensor` (whole, equal on all processes) on the device of `reference` and spread as it is; no communication."""
    if not isinstance(reference, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(reference.device)
    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(tensor.to(reference.device), mesh, placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Drops gathered parameters that FSDP2 may still hold: the next pass gathers what the shards hold by then."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
