"""What every public model of every paper keeps: the subjects of `tests/test_model_contract.py`.

A paper lists its models in `tests/PAPER/subjects.py` as `SUBJECTS: dict[str, Subject]`, tiny and with every option that
changes what is computed. What is dear (`ways`) is asked once for each graph; `slow` names further ways, which only
`make test-all` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.exported import WAYS, tensors

COMPILED = ("compile", "train")  # in evaluation, and a step of training


def squares(model: nn.Module, out: Any) -> Tensor:
    """A loss that every output takes part in."""
    return sum(value.float().square().sum() for value in tensors(out) if value.requires_grad)


@dataclass(frozen=True)
class Subject:
    """A tiny model and what it is asked.

    Args:
        build: the model.
        inputs: batch size -> inputs, all with the batch as their first axis.
        call: `(model, *inputs)` -> outputs, any nest of tensors; None: the model itself.
        loss: `(model, outputs)` -> the sum that reaches every parameter which is trained.
        ways: how it leaves Python in `make test`: of `COMPILED` and `tests.exported.WAYS`.
        slow: further ways, for `make test-all`.
        quick: samples, gradients and half precision are asked too; not where another subject has the same layers.
        trained: it has parameters: gradients are asked, and half precision by autocast.
        batch: of a training step.
        atol: between a batch and its samples, between a compiled model and itself.
        idle: beginnings of names of parameters that no loss reaches, which is meant so.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Sequence[Tensor]]
    call: Callable[..., Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] = squares
    ways: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    quick: bool = True
    trained: bool = True
    batch: int = 4
    atol: float = 1e-5
    idle: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert {*self.ways, *self.slow} <= {*COMPILED, *WAYS}, (self.ways, self.slow)

    def made(self) -> nn.Module:
        """The model, the same in every test."""
        torch.manual_seed(0)
        return self.build()

    def run(self, model: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """What the model gives."""
        return model(*inputs) if self.call is None else self.call(model, *inputs)


def images(*size: int, chans: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of random images, or of clips (frames, height, width)."""
    return lambda batch: (torch.randn(batch, chans, *size),)
