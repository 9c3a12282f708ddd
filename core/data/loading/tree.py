"""Tensors inside nested batches: dicts, lists, tuples, tv_tensors, mmengine's data elements, mmdet's boxes."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor
from torchvision import tv_tensors


def _wraps_tensor(data: Any) -> bool:
    # mmdet's boxes are no tensors, they hold one.
    return isinstance(getattr(data, "tensor", None), Tensor)


def map_tensors(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """``data`` with ``function`` applied to every tensor; everything else is kept as it is.

    tv_tensors stay what they are, with their meta data; data elements keep their class and meta information.
    """
    if isinstance(data, tv_tensors.TVTensor):
        return tv_tensors.wrap(function(data.as_subclass(Tensor)), like=data)
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, BaseDataElement):
        mapped = type(data)(metainfo=dict(data.metainfo_items()))
        mapped.set_data({key: map_tensors(function, value) for key, value in data.items()})
        return mapped
    if isinstance(data, Mapping):
        return {key: map_tensors(function, value) for key, value in data.items()}
    if isinstance(data, tuple):
        values = [map_tensors(function, value) for value in data]
        return type(data)(*values) if hasattr(data, "_fields") else tuple(values)
    if isinstance(data, list):
        return [map_tensors(function, value) for value in data]
    if _wraps_tensor(data):
        mapped = copy.copy(data)
        mapped.tensor = function(data.tensor)
        return mapped
    return data


def tensors(data: Any) -> Iterator[Tensor]:
    """Every tensor in ``data``."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, (Mapping, BaseDataElement)):
        for _, value in data.items():
            yield from tensors(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from tensors(value)
    elif _wraps_tensor(data):
        yield data.tensor


def to_device(data: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """``data`` with every tensor on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), data)


def channels_last(batch: Any) -> Any:
    """A batch with its images `(B, C, H, W)` in the memory format that convolutions on GPUs want."""
    if not isinstance(batch, dict):
        return batch
    return {
        key: value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
        else value
        for key, value in batch.items()
    }


def pin(data: Any) -> Any:
    """``data`` with every CPU tensor in page-locked memory, so that its copy to a GPU can overlap with work there."""
    return map_tensors(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor, data)
