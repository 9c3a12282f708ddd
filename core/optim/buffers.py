"""Buffers that processes keep for themselves, brought to one value before it counts: in evaluations and checkpoints.

Under data parallelism gradients are averaged, buffers are not: the running statistics of a batch norm that is not
synchronised are those of a process's own batches. As timm's ``--dist-bn reduce`` and mmengine's SyncBuffersHook do,
they are averaged over the processes. (The mean of running averages is the running average of the means, so that it
makes no difference how often that is done. Variances are those within the processes' batches.) Every other buffer
that differs takes the first process's value, which is what a checkpoint holds and a resumed run begins with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.config.command.processes import backend_device
from core.optim.dtensor import is_sharded

STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def reconcile(named: Iterable[tuple[str, Tensor]]) -> None:
    """Gives every buffer the same value on all processes, in place. Collective; nothing happens in one process.

    Args:
        named: names and buffers, in the same order on all processes; those whose names end in `STATISTICS` are
            averaged.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [(name, buffer) for name, buffer in named if not is_sharded(buffer) and buffer.numel()]
    averaged = [b for name, b in buffers if name.rpartition(".")[2] in STATISTICS and b.is_floating_point()]
    chosen = {id(b) for b in averaged}
    _average(averaged)
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for _, buffer in buffers:
        if id(buffer) not in chosen:
            by_type.setdefault(buffer.dtype, []).append(buffer)
    for alike in by_type.values():
        values = _flat(alike)
        dist.broadcast(values, src=0)
        _put_back(alike, values)


def reconcile_module(module: nn.Module) -> None:
    """`reconcile` for a module's buffers."""
    reconcile(module.named_buffers())


def _average(buffers: list[Tensor]) -> None:
    """Means over the processes, in float64; values that are equal everywhere stay as they are, bit for bit."""
    if not buffers:
        return
    own = _flat([buffer.double() for buffer in buffers])
    extremes = torch.stack([own, -own])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    mean = own.clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    _put_back(buffers, torch.where(extremes[0] == -extremes[1], own, mean))


def _flat(tensors: list[Tensor]) -> Tensor:
    """One vector where the process group can reach it."""
    return torch.cat([tensor.detach().reshape(-1).to(backend_device()) for tensor in tensors])


def _put_back(tensors: list[Tensor], values: Tensor) -> None:
    for tensor, part in zip(tensors, values.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def place_batch_norms(model: nn.Module, device: torch.device, synchronised: bool) -> nn.Module:
    """Batch norms that fit the device: PyTorch synchronises them on GPUs only.

    Args:
        model: of several processes or one.
        device: of this process.
        synchronised: several processes on GPUs normalise with the statistics of the joint batch.
    """
    from mmengine.model import revert_sync_batchnorm

    several = dist.is_initialized()
    if device.type == "cpu" or not several:
        return revert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model
