"""The base of every paper's trainer: what one step is.

A trainer owns its networks as plain submodules and says, in methods of tensors, what a loss and a prediction are. The
engine around it (core.engine.runner, core.engine.loops.train, core.engine.loops.evaluation) decides where and how often
they are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import ConfigError, nearest

Batch = dict[str, Any]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager:
    """The mixed-precision context of a forward pass; nothing for fp32.

    Raises:
        ConfigError: `precision` is none of fp32, bf16, fp16.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision '{precision}' is none of {list(PRECISIONS)}{nearest(precision, PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)


@dataclass
class Inference:
    """What ``tools/infer.py`` writes for one input.

    record: values for the JSON file.
    pictures: name -> uint8 array, (H, W, 3) for a PNG or (T, H, W, 3) for a GIF.
    arrays: name -> arrays by name, for an NPZ file.
    write: writes further files into a folder of the input's own, which it makes, and returns the one to open first.
    """

    record: dict[str, Any]
    pictures: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    write: Callable[[Path], Path] | None = None


class _Wrapper(list):
    """The distributed wrapper of a trainer, in a list, so that it is not a child of its child; a copy has none."""

    def __deepcopy__(self, memo: dict) -> _Wrapper:
        return _Wrapper()


class Trainer(BaseModel):
    """One optimisation step and one prediction, as tensors.

    A paper with one optimizer implements `losses` and `predict`. A paper with several overrides `train_step` and calls
    `phase` once per sub-step, e.g. ``self.phase("generator_losses", batch, optim_wrapper["generator"])``.

    Args:
        frozen: names of submodules that are not trained: no gradients, and evaluation mode whatever happens.
    """

    #: Shape of one input without the batch axis, e.g. (3, 224, 224); profiling and compilation use it.
    input_shape: tuple[int, ...] | None = None
    #: Submodules with an optimizer of their own, where there are several; a config with one ``optimizer`` serves each.
    optimizer_parts: tuple[str, ...] = ()

    #: Whether the first batches of every evaluation are tried out before training; False where a batch takes minutes.
    sanity_check: bool = True
    #: The submodule whose names the state dict's entries have, where a wrapper leaves its own out; None: this module.
    named_by: nn.Module | None = None
    #: Whether `training_data` and `evaluation_data` may keep what they derive; the engine says no in a fast dev run.
    keeps_data: bool = True

    def __init__(self, frozen: Sequence[str] = ()) -> None:
        super().__init__()
        if isinstance(frozen, str):
            raise ConfigError(f"frozen={frozen}: a list of names, [{frozen}]")
        self.frozen = tuple(frozen)
        self.precision = "fp32"
        self._data_parallel = _Wrapper()

    # ------------------------------------------------------------------ what a paper says
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar tensors; those with "loss" in their name are summed into the training loss, the others are logged."""
        raise NotImplementedError(f"{type(self).__name__} has no losses(batch)")

    def predict(self, batch: Batch) -> dict[str, Any]:
        """What metrics read, e.g. ``{"logits": (B, K), "label": (B,)}``; no gradients, evaluation mode."""
        raise NotImplementedError(f"{type(self).__name__} has no predict(batch)")

    def infer(self, file: Path) -> Inference:
        """The prediction for a user's own file, with pictures that explain it."""
        raise ConfigError(f"{type(self).__name__} offers no inference on single files")

    def generate(self) -> Inference:
        """What the model makes without any input, for ``tools/infer.py`` without ``input=``."""
        raise ConfigError(f"{type(self).__name__} makes nothing without an input: give input=FILE_OR_FOLDER")

    def facts(self, cfg: dict[str, Any]) -> dict[str, Any]:
        """What ``result.json`` says of a run beside its figures, under `facts`: plain values, e.g. a data set's source.

        Args:
            cfg: the run's config.
        """
        return {}

    def training_data(self, dataset: Any) -> Any:
        """What is trained on in place of a training data set: itself, or what a frozen part makes of it, kept on disk.

        Called once, with the model on its device and in its precision, by every process. It sees the weights that the
        run began with; also in a run that goes on from a checkpoint, which is restored afterwards. Where `keeps_data`
        is false (a fast dev run), nothing is kept on disk.
        """
        return dataset

    def evaluation_data(self, dataset: Any) -> Any:
        """What is evaluated on in place of a data set of an evaluation: itself, or with what a frozen part makes of it.

        Called once for each set, before its first evaluation, with the weights that are evaluated, by every process.
        """
        return dataset

    # ------------------------------------------------------------------ steps
    def train_step(self, data: Batch, optim_wrapper: Any) -> dict[str, Tensor]:
        """One update from one batch; returns detached loss terms (still on the device)."""
        return self.phase("losses", data, optim_wrapper)

    def phase(self, name: str, batch: Batch, optim_wrapper: Any) -> dict[str, Tensor]:
        """One optimisation phase: the method `name` gives the losses, `optim_wrapper` takes the step.

        Goes through DistributedDataParallel's forward when there is one, so that gradients are averaged.
        """
        entry = self._data_parallel[0] if self._data_parallel else self
        with optim_wrapper.optim_context(entry):
            losses = entry(batch, name)
        total, logs = self.parse_losses(losses)
        optim_wrapper.update_params(total)
        return logs

    def forward(self, batch: Batch, method: str = "losses") -> Any:
        """Calls the method of that name; the one door through which distributed wrappers see every pass."""
        return getattr(self, method)(batch)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss (sum of the terms named "...loss...") and all terms, detached, for the log."""
        terms = {name: value.mean() if value.ndim else value for name, value in losses.items()}
        parts = [value for name, value in terms.items() if "loss" in name]
        if not parts:
            raise ConfigError(f"no term with 'loss' in its name among {sorted(terms)}")
        if "loss" in terms and len(parts) > 1:
            raise ConfigError(f"'loss' is the name of the sum; rename that term ({sorted(terms)})")
        total = torch.stack([p.float() for p in parts]).sum()
        return total, {"loss": total.detach(), **{name: value.detach() for name, value in terms.items()}}

    def val_step(self, data: Batch) -> dict[str, Any]:
        """`predict` without gradients, in the run's precision."""
        with torch.no_grad(), self.autocast():
            return self.predict(data)

    test_step = val_step

    def autocast(self) -> contextlib.AbstractContextManager:
        """The mixed-precision context of evaluation."""
        return autocast(self.precision, self.device.type)

    # ------------------------------------------------------------------ state
    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def freeze(self) -> None:
        """Applies `frozen`: the named submodules lose their gradients and stay in evaluation mode.

        Raises:
            ConfigError: a name is no submodule.
        """
        for module in self._frozen_modules():
            module.requires_grad_(False)
            module.eval()

    def _frozen_modules(self) -> Iterator[nn.Module]:

        for name in self.frozen:
            try:
                yield self.get_submodule(name)
            except AttributeError:
                known = [n for n, _ in self.named_modules() if n]
                raise ConfigError(
                    f"frozen: {type(self).__name__} has no submodule '{name}'{nearest(name, known)}"
                ) from None

    def train(self, mode: bool = True) -> Trainer:
        """Training mode, except for the frozen parts (batch norm statistics and dropout included)."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    # ------------------------------------------------------------------ what tools look at
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name: what is compiled, sharded and profiled. Children that have parameters."""
        return {name: child for name, child in self.named_children() if any(True for _ in child.parameters())}

    def inference_network(self) -> nn.Module:
        """The module whose forward pass is the paper's cost: the child called `network`, or the only one.

        Raises:
            ConfigError: there are several; the trainer has to say which.
        """
        networks = self.networks()
        if "network" in networks:
            return networks["network"]
        if len(networks) != 1:
            raise ConfigError(f"{type(self).__name__} has networks {sorted(networks)}: override inference_network()")
        return next(iter(networks.values()))

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[Any, ...]:
        """Arguments for `inference_network()`: one tensor (B, *input_shape).

        Raises:
            ConfigError: `input_shape` is not set.
        """
        if self.input_shape is None:
            raise ConfigError(f"{type(self).__name__} sets no input_shape: override example_inputs()")
        return (torch.zeros(batch_size, *self.input_shape, device=device),)

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """A batch for a training step on made-up data: image (B, *input_shape) and labels of class 0."""
        (image,) = self.example_inputs(batch_size, device)
        return {
            "image": torch.randn_like(image) if image.device.type != "meta" else image,
            "label": torch.zeros(batch_size, dtype=torch.long, device=device),
            "sample_id": [str(i) for i in range(batch_size)],
        }


class DataParallelTrainer(DistributedDataParallel):
    """DistributedDataParallel around a trainer: the steps are the trainer's, every training pass goes through DDP."""

    module: Trainer

    def __init__(self, module: Trainer, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        module._data_parallel[:] = [self]

    def train_step(self, data: Batch, optim_wrapper: Any) -> dict[str, Tensor]:
        """See `Trainer.train_step`."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Batch) -> dict[str, Any]:
        """See `Trainer.val_step`; processes do not talk to each other."""
        return self.module.val_step(data)

    test_step = val_step


def unwrap(model: nn.Module) -> nn.Module:
    """The trainer inside a distributed wrapper, or `model` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
