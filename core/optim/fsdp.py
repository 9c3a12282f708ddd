"""Sharding with PyTorch's fully_shard (FSDP2), and model states that load on any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from core.trainer import Trainer

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)


def shard(trainer: Trainer, device: torch.device, *, reshard_after_forward: bool = True, offload: bool = False) -> None:
    """Shards every network of a trainer in place: each item of a ModuleList (a block) is a unit, then the network.

    Args:
        trainer: its `networks()` are sharded; everything they compute must go through their forward.
        device: decides the kind of the mesh.
        reshard_after_forward: free a block's gathered parameters between forward and backward.
        offload: keep parameters, gradients and optimizer states in CPU memory.
    """
    import torch.distributed as dist

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for network in trainer.networks().values():
        blocks = [item for m in network.modules() if isinstance(m, nn.ModuleList) for item in m]
        for block in blocks:
            if any(True for _ in block.parameters()):
                fully_shard(block, **options)
        fully_shard(network, **options)


def full_model_state(model: nn.Module) -> dict[str, Any]:
    """Full tensors on the CPU; collective."""
    return get_model_state_dict(model, options=_FULL)


def load_full_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Full tensors into a sharded model; every process holds the full state."""
    set_model_state_dict(model, state, options=_FROM_RANK_0)
