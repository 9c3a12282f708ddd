"""Data sets of several tasks side by side, for steps of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from core.errors import ConfigError


class SideBySide(Dataset):
    """Sample i of every task: `image` `(T, 3, H, W)` and `label` `(T,)`.

    Each task's samples come in the order in which the task alone would see them, since the order depends on the number
    of samples, the seed and the epoch only; so all tasks need equally many.

    Args:
        datasets: of the tasks, with `image` and `label`.

    Raises:
        ConfigError: none, or they differ in size.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        sizes = [len(dataset) for dataset in datasets]
        if len(set(sizes)) != 1:
            raise ConfigError(f"tasks that are trained together need equally many samples, these have {sizes}")
        self.datasets = list(datasets)
        #: Whether samples depend on their index alone.
        self.fixed = all(getattr(dataset, "fixed", False) for dataset in datasets)

    def __len__(self) -> int:
        return len(self.datasets[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = [dataset[index] for dataset in self.datasets]
        return {
            "image": torch.stack([sample["image"] for sample in samples]),
            "label": torch.tensor([int(sample["label"]) for sample in samples]),
            "sample_id": " | ".join(str(sample.get("sample_id", index)) for sample in samples),
        }

    @property
    def origin(self) -> list[Any]:
        """What every task's data came from."""
        return [getattr(dataset, "origin", None) for dataset in self.datasets]


class OfTask(Dataset):
    """A task's data set with the task's number in every sample, for the evaluation of packed networks.

    Args:
        dataset: of the task.
        task: its number.
    """

    def __init__(self, dataset: Dataset, task: int) -> None:
        self.dataset, self.task = dataset, task

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "task": self.task}

    @property
    def origin(self) -> Any:
        """What the data came from."""
        return getattr(self.dataset, "origin", None)
