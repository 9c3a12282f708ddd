"""What a run began with, for a run that goes on: its training data may have been derived from those weights.

`core.Trainer.training_data` sees the weights before the first step. A resumed run builds its data before it restores
the checkpoint, whose weights have moved on; it needs those of the first leg again. They come from where they came from
then (constructor, seed and ``load_from``), or, where these give others by now, from the checkpoint, which still has
those that training leaves alone. Digests in the checkpoint tell which are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from core.data.loading.seeds import preserved_random_state, seed_sample
from core.data.provenance import hash_state
from core.errors import ConfigError
from core.trainer import Trainer


class Beginning:
    """Digests of a model's first weights and of the training data that it derived from them.

    Args:
        model: a trainer as built, with its initial weights.
        checkpoint: of the run, where it goes on: the model gets the weights that the run began with, so far as they
            are to be had.

    Attributes:
        taken: names of weights that were taken from the checkpoint, since the model was built with others.
    """

    def __init__(self, model: nn.Module, checkpoint: Mapping[str, Any] | None = None) -> None:
        saved = (checkpoint or {}).get("beginning")
        self.weights: dict[str, str] = digests(model) if saved is None else saved["weights"]
        self.data: str | None = None if saved is None else saved["data"]
        self.taken: list[str] = []
        self._lost: list[str] = []
        if saved is not None:
            self._put_back(model, checkpoint["model"])

    @torch.no_grad()
    def _put_back(self, model: nn.Module, saved: Mapping[str, Any]) -> None:
        for name, value in model.state_dict().items():
            if self._began(name, value):
                continue
            if name in saved and self._began(name, saved[name]):
                value.copy_(saved[name])
                self.taken.append(name)
            else:
                self._lost.append(name)

    def _began(self, name: str, value: Any) -> bool:
        return self.weights.get(name) == hash_state({name: value})

    def derived(self, dataset: Any) -> None:
        """Notes what the training data are, or holds them against those of the first leg.

        Raises:
            ConfigError: they are others, since weights that the run began with are gone.
        """
        found = probe(dataset)
        if self._lost and self.data not in (None, found):
            shown = ", ".join(self._lost[:3]) + (f" and {len(self._lost) - 3} more" if len(self._lost) > 3 else "")
            raise ConfigError(
                "the training data are derived from weights that are no longer those that the run began with "
                f"({shown}): give load_from, and the files that the model reads, as they were when the run began"
            )
        self.data = found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"weights": self.weights, "data": self.data}


def derives_data(model: nn.Module) -> bool:
    """Whether a model makes training data of its own weights: it is a trainer with a `training_data` of its own."""
    return isinstance(model, Trainer) and type(model).training_data is not Trainer.training_data


def digests(model: nn.Module) -> dict[str, str]:
    """A digest of every entry of the model's state dict, by name."""
    return {name: hash_state({name: value}) for name, value in model.state_dict().items()}


def probe(dataset: Any) -> str:
    """A digest of the first, middle and last sample as they are read with a fixed seed."""
    places = sorted({0, len(dataset) // 2, len(dataset) - 1} & set(range(len(dataset))))
    samples = {}
    for place in places:
        with preserved_random_state():
            seed_sample(place)
            sample = dataset[place]
        entries = sample.items() if isinstance(sample, Mapping) else [("sample", sample)]
        samples |= {f"{place}.{name}": value for name, value in entries}
    return hash_state(samples)
