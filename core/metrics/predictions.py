"""What every metric reads of a batch's predictions, and the checks that no figure goes without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric

from core.errors import VitrineError, nearest


class MetricError(VitrineError, ValueError):
    """An evaluation whose figures would not mean what they say."""


class OwnMetric(BaseMetric):
    """A metric that gathers over processes by itself: subclasses have `process` and `evaluate`."""

    default_prefix = ""

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Not used: see `evaluate`."""
        raise NotImplementedError

    def prefixed(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The figures under their names, with the prefix in front."""
        return {f"{self.prefix}/{name}" if self.prefix else name: value for name, value in figures.items()}


def batches(samples: Any) -> Iterator[Mapping[str, Any]]:
    """The dictionaries of whole batches in what an evaluation loop hands over: one, or a list of them."""
    if isinstance(samples, Mapping):
        yield samples
    elif isinstance(samples, Sequence) and all(isinstance(s, Mapping) for s in samples):
        yield from samples
    else:
        raise MetricError(f"predict() returned a {type(samples).__name__}, not a dictionary of batched tensors")


def read(key: str, predicted: Mapping[str, Any], batch: Any) -> Any:
    """A value of the prediction, else of the batch.

    Raises:
        MetricError: neither has it; near names are in the message.
    """
    if key in predicted:
        return predicted[key]
    if isinstance(batch, Mapping) and key in batch:
        return batch[key]
    known = [*predicted, *(batch if isinstance(batch, Mapping) else ())]
    raise MetricError(
        f"neither predict() nor the batch has '{key}'{nearest(key, known)} (there are {sorted(set(known))})"
    )


def count_samples(values: Sequence[Any], predicted: Mapping[str, Any]) -> int:
    """Samples in a batch: the length of its ids, else of the first value."""
    if "sample_id" in predicted:
        return len(predicted["sample_id"])
    first = values[0]
    return len(first) if not isinstance(first, torch.Tensor) or first.ndim else 1


class NanCount:
    """Counts NaN among predictions without making the device wait."""

    def __init__(self) -> None:
        self._found: torch.Tensor | None = None

    def add(self, value: Any) -> None:
        """Looks at a tensor of floating-point numbers; anything else cannot be NaN."""
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            found = value.detach().isnan().sum()
            self._found = found if self._found is None else self._found.to(found.device) + found

    def take(self) -> int:
        """How many there were; a new count begins."""
        found, self._found = self._found, None
        return 0 if found is None else int(found)


def check_counts(name: str, seen: int, nans: int, size: int | None, check_size: bool) -> None:
    """Holds what a metric has seen, over all processes, against the data set.

    Raises:
        MetricError: no sample, NaN among the predictions, or more samples than the data set has.
    """
    if seen == 0:
        raise MetricError(f"{name}: not one sample was evaluated; is the evaluation split empty?")
    if nans:
        raise MetricError(f"{name}: {nans} values of the predictions are NaN, so no figure is given")
    if size is None or not check_size or seen == size:
        return
    if seen > size:
        raise MetricError(
            f"{name}: {seen} samples were evaluated, but the data set has {size}: some were counted twice "
            "(check_size=false, if one item gives several samples)"
        )
    warnings.warn(f"{name}: only {seen} of {size} samples were evaluated", stacklevel=3)


def gather(value: Any) -> list[Any]:
    """A Python object of every process, in their order."""
    return all_gather_object(value)


def collective_device() -> torch.device | None:
    """Where tensors have to lie to be gathered; None: anywhere."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return None
