"""A list of samples becomes a batch."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors

from core.data.errors import SampleError, SampleFault
from core.data.loading.tree import pin


class LoadedBatch(NamedTuple):
    """What a loader yields.

    data    the collated samples; None when evaluation left all of them out
    errors  what was passed over to make them
    """

    data: Any
    errors: list[SampleFault]

    def pin_memory(self) -> "LoadedBatch":
        """The same batch in page-locked memory (called by the loader's pinning thread)."""
        return LoadedBatch(pin(self.data), self.errors)


class Fetched(NamedTuple):
    """One sample on its way to the collate function: None where it is left out, or where it failed for good."""

    sample: Any
    errors: list[SampleFault]
    failure: SampleError | None = None


class FailedBatch(NamedTuple):
    """Carries an error to the main process whole; torch would bury its message in a worker's traceback."""

    error: SampleError


class Collate:
    """Stack a list of dict samples into one dict.

    - tensors and arrays of equal shape are stacked to (B, ...);
    - numbers become one tensor: bool, int64 or float32;
    - nested dicts are collated in turn;
    - everything else is kept as a list of length B: strings, None, objects, and tv_tensors' boxes and key points,
      whose number differs from sample to sample.

    Args:
        lists: keys kept as lists even though their values are tensors (per-object masks or labels). A key inside a
            nested dict is written ``outer.inner``.

    Raises:
        ValueError: naming the key, the shapes and the sample ids when tensors do not stack or keys differ.
    """

    def __init__(self, lists: Sequence[str] = ()) -> None:
        self.lists = frozenset(lists)

    def __repr__(self) -> str:
        return f"Collate(lists={sorted(self.lists)})"

    def __call__(self, samples: Sequence[Any]) -> Any:
        if isinstance(samples[0], Mapping):
            return self._dicts(samples, _names(samples), "")
        return self._values(samples, [f"sample {i}" for i in range(len(samples))], "")

    def _dicts(self, samples: Sequence[Mapping], names: list[str], prefix: str) -> dict[str, Any]:
        keys = list(samples[0])
        for sample, name in zip(samples, names, strict=True):
            if sample.keys() != samples[0].keys():
                odd = sorted(sample.keys() ^ samples[0].keys())
                raise ValueError(f"samples of one batch have different keys: {odd} in only one of {names[0]}, {name}")
        return {key: self._values([sample[key] for sample in samples], names, f"{prefix}{key}") for key in keys}

    def _values(self, values: list[Any], names: list[str], key: str) -> Any:
        if key in self.lists:
            return list(values)
        if all(isinstance(value, Mapping) for value in values):
            return self._dicts(values, names, f"{key}.")
        if any(isinstance(value, (tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)) for value in values):
            return list(values)
        if all(isinstance(value, (Tensor, np.ndarray)) and _is_numeric(value) for value in values):
            return _stack([_plain(value) for value in values], names, key)
        if all(isinstance(value, (bool, np.bool_)) for value in values):
            return torch.tensor([bool(value) for value in values])
        if all(isinstance(value, numbers.Integral) for value in values):
            return torch.tensor([int(value) for value in values], dtype=torch.int64)
        if all(isinstance(value, numbers.Real) for value in values):
            return torch.tensor([float(value) for value in values], dtype=torch.float32)
        return list(values)


def collate(samples: Sequence[Any]) -> Any:
    """:class:`Collate` without any key kept apart."""
    return Collate()(samples)


class CollateFetched:
    """Turn what :class:`core.data.SeededDataset` hands over into a :class:`LoadedBatch`."""

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self.inner = inner

    def __call__(self, fetched: list[Fetched]) -> LoadedBatch | FailedBatch:
        for item in fetched:
            if item.failure is not None:
                return FailedBatch(item.failure)
        errors = [error for item in fetched for error in item.errors]
        samples = [item.sample for item in fetched if item.sample is not None]
        return LoadedBatch(self.inner(samples) if samples else None, errors)


def _names(samples: Sequence[Mapping]) -> list[str]:
    return [str(sample.get("sample_id", f"sample {i}")) for i, sample in enumerate(samples)]


def _is_numeric(value: Tensor | np.ndarray) -> bool:
    return isinstance(value, Tensor) or value.dtype.kind in "biufc"


def _plain(value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, np.ndarray):
        # Arrays mapped from files are read-only, and torch warns about those even though stacking copies.
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return value.as_subclass(Tensor)


def _stack(values: list[Tensor], names: list[str], key: str) -> Tensor:
    kinds: dict[tuple, str] = {}
    for value, name in zip(values, names, strict=True):
        kinds.setdefault((tuple(value.shape), value.dtype), name)
    if len(kinds) > 1:
        seen = ", ".join(
            f"{shape} {str(dtype).removeprefix('torch.')} of {name!r}"
            for (shape, dtype), name in list(kinds.items())[:4]
        )
        raise ValueError(
            f"{key or 'samples'!r} cannot be stacked into a batch: {seen}. Make the shapes equal in the dataset's "
            f"transform, or keep a list with collate_fn: {{type: core.data.Collate, lists: [{key}]}}"
        )
    # Inside a worker this stacks straight into shared memory, which spares one copy.
    return default_collate(values)


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of its ``sample_id`` (``data_samples`` in OpenMMLab's), or of its first tensor.

    0 when there is neither.
    """
    if isinstance(batch, dict):
        for key in ("sample_id", "data_samples"):
            if key in batch:
                return len(batch[key])
        batch = list(batch.values())
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 0
    if isinstance(batch, list | tuple):
        return next((n for n in map(batch_size, batch) if n), 0)
    return 0
