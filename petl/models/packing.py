"""Several tasks in one pass: they share a frozen backbone, and each has modules of its own (section 12).

Images of T tasks go through the backbone as one batch. What differs between tasks (the modules, tuned norms, heads,
channels) has an axis of tasks in front, and is applied by grouped matrix products: `torch.func.vmap` over that axis
turns every product with such a weight into one batched product, and leaves those with the shared weights as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petl.models.inject import PetlModel


class PackedModel(nn.Module):
    """Tuned networks of one backbone, run and trained together.

    `stacked` holds what the tasks train, `(T, ...)` each, under the names of a single network with dots replaced; the
    first network is kept as the template and gives the shared weights.

    Args:
        models: T networks from `petl.inject`: the same backbone with the same weights, the same method with the same
            sizes; channels, initial values and numbers of classes may differ.

    Raises:
        ValueError: fewer than one network, or they differ in more than that.
    """

    def __init__(self, models: Sequence[PetlModel]) -> None:
        super().__init__()
        if not models:
            raise ValueError("PackedModel needs at least one network")
        states = [_own(model) for model in models]
        shared = _shared(models[0])
        for number, (model, state) in enumerate(zip(models, states, strict=True)):
            head = {name for name in state if model.in_head(name)}
            wrong = [n for n in states[0] if n not in state or (n not in head and state[n].shape != states[0][n].shape)]
            if wrong or state.keys() != states[0].keys():
                raise ValueError(f"network {number} differs from the first in {(wrong or sorted(state))[:3]}")
            other = _shared(model)
            if other.keys() != shared.keys() or any(not _equal(shared[n], other[n]) for n in shared):
                raise ValueError(f"network {number} has another backbone, or other weights of it, than the first")
        self.weights: str | None = None  # file of the pre-trained weights, where a config names one
        self.classes = tuple(int(model.backbone.get_classifier().out_features) for model in models)
        most = max(self.classes)
        self.template = copy.deepcopy(models[0])
        self.template.requires_grad_(False)
        trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
        self.trained, self.buffers_of_tasks = tuple(n for n in states[0] if n in trained), []
        self.stacked = nn.ParameterDict()
        for name in states[0]:
            values = [state[name] for state in states]
            if models[0].in_head(name):
                values = [_padded(value, most) for value in values]
            value = torch.stack([v.detach().clone() for v in values])
            if name in trained:
                self.stacked[_key(name)] = nn.Parameter(value)
            else:
                self.register_buffer(f"fixed_{_key(name)}", value)
                self.buffers_of_tasks.append(name)
        allowed = torch.arange(most) < torch.tensor(self.classes)[:, None]
        self.register_buffer("allowed", allowed, persistent=False)

    def train(self, mode: bool = True) -> PackedModel:
        """Training mode of the template, which runs for all tasks."""
        super().train(mode)
        return self

    def _parts(self) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {name: self.stacked[_key(name)] for name in self.trained}
        return parts | {name: getattr(self, f"fixed_{_key(name)}") for name in self.buffers_of_tasks}

    def forward(self, image: Tensor) -> Tensor:
        """Logits `(T, B, most classes)` of `image` `(T, B, 3, H, W)`; classes that a task does not have are -inf."""

        def one(parts: Mapping[str, Tensor], batch: Tensor) -> Tensor:
            return functional_call(self.template, dict(parts), (batch,))

        logits = torch.vmap(one, randomness="different")(self._parts(), image)
        return logits.masked_fill(~self.allowed[:, None], -torch.inf)

    def of(self, task: int, image: Tensor) -> Tensor:
        """Logits `(B, classes)` of `image` `(B, 3, H, W)` by one task's network."""
        parts = {name: value[task] for name, value in self._parts().items()}
        return functional_call(self.template, parts, (image,))[:, : self.classes[task]]

    def unpack(self, models: Sequence[PetlModel]) -> None:
        """Writes every task's tensors into its network, as given to the constructor."""
        with torch.no_grad():
            for task, model in enumerate(models):
                own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
                for name, value in self._parts().items():
                    target = own[name]
                    target.copy_(value[task][tuple(slice(size) for size in target.shape)])


def _own(model: PetlModel) -> dict[str, Tensor]:
    """What may differ from task to task: all that is trained or kept, and what the method registers (channels)."""
    names = set(model.delta_names())
    own = {name: value for name, value in model.named_parameters() if name in names}
    return own | {name: value for name, value in model.named_buffers() if name.startswith("tuning.")}


def _shared(model: PetlModel) -> dict[str, Tensor]:
    own = _own(model)
    return {name: value for name, value in model.state_dict().items() if name not in own}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def _padded(value: Tensor, rows: int) -> Tensor:
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])]) if len(value) < rows else value


def _key(name: str) -> str:
    return name.replace(".", "__")
