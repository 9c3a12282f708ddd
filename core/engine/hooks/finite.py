"""A loss or a gradient that is not finite stops the run, and says which step, which terms and which samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import VitrineError
from core.optim.dtensor import is_sharded, local
from core.trainer import unwrap


class NonFiniteLoss(VitrineError, FloatingPointError):
    """Training met a NaN or an infinity; the message tells where, a file holds the state to look at."""


class NonFiniteGradient(VitrineError, FloatingPointError):
    """A gradient is NaN or infinite though the loss is not; the message names the first parameter of which it is."""


@dataclass
class _Step:
    """What has to be judged of one step; tensors on the CPU, valid once `ready` has passed."""

    step: int
    outputs: dict[str, Any]
    batch: Any
    loss_is_finite: Tensor | None
    gradients: list[tuple[Sequence[nn.Parameter], Tensor]]
    ready: Any = None


@dataclass
class FiniteCheck:
    """Looks at every step's loss terms and gradients without making the device wait.

    On a GPU the answer for a step is read one step later, when it is there anyway; the report still names the right
    step and samples. On the CPU it is read at once, and the update with such a gradient is not made.
    """

    runner: Any
    _pending: deque[_Step] = field(default_factory=deque)
    _gradients: list[tuple[Sequence[nn.Parameter], Tensor]] = field(default_factory=list)
    _harmed: bool = False

    def watch(self, optim_wrapper: Any) -> None:
        """Has the gradients of every update looked at; wrappers that are not `core.OptimWrapper` do not offer that."""
        for wrapper in optim_wrapper.values() if hasattr(optim_wrapper, "values") else [optim_wrapper]:
            if hasattr(wrapper, "watch"):
                wrapper.watch = self.gradients

    def gradients(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Takes note of an update's gradients.

        Returns:
            Whether the update may be made: on the CPU not with a gradient that is not finite, nor after one.
        """
        if self._harmed or not parameters:
            return not self._harmed
        harmed = not_finite(parameters)
        if any(is_sharded(p.grad) for p in parameters) and dist.get_world_size() > 1:
            dist.all_reduce(harmed, op=dist.ReduceOp.MAX)  # every process holds another part of each
        if harmed.device.type == "cuda":
            self._gradients.append((parameters, harmed.to("cpu", non_blocking=True)))
            return True
        self._harmed = bool(harmed.any())
        if self._harmed:
            self._gradients.append((parameters, harmed))
        return not self._harmed

    def check(self, step: int, outputs: dict[str, Tensor], batch: Any) -> None:
        """Takes note of a step's terms and judges those that are ready.

        Raises:
            NonFiniteLoss: with step, terms and sample ids.
            NonFiniteGradient: with the first parameter, too.
        """
        if "loss" not in outputs:
            terms = [v for v in outputs.values() if isinstance(v, Tensor)]
        else:
            terms = [outputs["loss"]]
        finite = torch.stack([t.detach().float().sum() for t in terms]).isfinite().all() if terms else None
        gradients, self._gradients = self._gradients, []
        taken = _Step(step, outputs, batch, finite, gradients)
        on_device = torch.cuda.is_available() and self.runner.device.type == "cuda"
        if on_device:
            taken.loss_is_finite = None if finite is None else finite.to("cpu", non_blocking=True)
            taken.ready = torch.cuda.Event()
            taken.ready.record()
        self._pending.append(taken)
        while len(self._pending) > (1 if on_device else 0):
            self._judge()

    def flush(self) -> None:
        """Judges what is still open."""
        while self._pending:
            self._judge()

    def _judge(self) -> None:
        taken = self._pending.popleft()
        if taken.ready is not None:
            taken.ready.synchronize()
        loss_is_finite = taken.loss_is_finite is None or bool(taken.loss_is_finite)
        harmed = [p for parameters, flags in taken.gradients for p, bad in zip(parameters, flags, strict=True) if bad]
        if loss_is_finite and not harmed:
            return
        terms = {name: float(value) for name, value in taken.outputs.items() if isinstance(value, Tensor)}
        listed = ", ".join(f"{name}={value:.6g}" for name, value in terms.items())
        samples = _names(taken.batch)
        path = self.runner.save_debug_state(taken.step, terms, taken.batch)
        rest = (
            f"samples: {samples if samples is not None else 'the batch holds no sample_id'}\n"
            f"model and batch are saved in {path}; earlier checkpoints are untouched"
        )
        if not loss_is_finite:
            raise NonFiniteLoss(f"the loss of step {taken.step} is not finite: {listed}\n{rest}")
        names = {id(p): name for name, p in unwrap(self.runner.model).named_parameters()}
        others = f" (and of {len(harmed) - 1} more parameters)" if len(harmed) > 1 else ""
        written = "" if taken.ready is not None else "; the update was not made"
        raise NonFiniteGradient(
            f"the gradient of '{names.get(id(harmed[0]), 'a parameter outside of the model')}'{others} is not finite "
            f"at step {taken.step}, though the loss of this process is: {listed}{written}\n{rest}\n"
            "look for a function whose derivative is infinite there (sqrt, log or norm of 0); "
            "optim_wrapper.clean_gradients={nan: 0, posinf: 0, neginf: 0} replaces such entries"
        )


def not_finite(parameters: Sequence[nn.Parameter]) -> Tensor:
    """1.0 for every parameter of which this process's part of the gradient is not finite, else 0.0; on its device."""
    gradients = [local(p.grad) for p in parameters]
    gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    filled = [i for i, g in enumerate(gradients) if g.numel()]
    flags = torch.zeros(len(gradients), device=gradients[0].device)
    if not filled:
        return flags
    # One kernel for all. The largest entry is exact; the CPU is faster with a sum of squares, which may overflow.
    exact = flags.device.type == "cuda"
    norms = torch._foreach_norm([gradients[i] for i in filled], float("inf") if exact else 2.0)
    finite = torch.stack([norm.to(flags.device, torch.float32) for norm in norms]).isfinite()
    if not exact and not bool(finite.all()):
        finite = torch.stack([gradients[i].isfinite().all().to(flags.device) for i in filled])
    if len(filled) == len(gradients):
        return (~finite).float()
    flags[torch.tensor(filled, device=flags.device)] = (~finite).float()
    return flags


def _names(batch: Any) -> list[str] | None:
    """The batch's sample ids, or the image files of an OpenMMLab batch."""
    if not isinstance(batch, dict):
        return None
    if "data_samples" in batch:
        return [str(getattr(s, "img_path", getattr(s, "img_id", "?"))) for s in batch["data_samples"]]
    return batch.get("sample_id")
