"""A loss that is not finite stops the run, and says which step, which terms and which samples."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from core.errors import VitrineError


class NonFiniteLoss(VitrineError, FloatingPointError):
    """Training met a NaN or an infinity; the message tells where, a file holds the state to look at."""


class FiniteCheck:
    """Looks at every step's loss terms without making the device wait.

    On a GPU the answer for a step is read one step later, when it is there anyway; the report still names the right
    step and samples. On the CPU it is read at once.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self._pending: deque[tuple[int, torch.Tensor, dict[str, torch.Tensor], Any]] = deque()

    def check(self, step: int, outputs: dict[str, torch.Tensor], batch: Any) -> None:
        """Takes note of a step's terms and judges those that are ready.

        Raises:
            NonFiniteLoss: with step, terms and sample ids.
        """
        if "loss" not in outputs:
            terms = [v for v in outputs.values() if isinstance(v, torch.Tensor)]
        else:
            terms = [outputs["loss"]]
        if not terms:
            return
        finite = torch.stack([t.detach().float().sum() for t in terms]).isfinite().all()
        on_device = finite.device.type == "cuda"
        if on_device:
            finite = finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, finite, outputs, (batch, event)))
        else:
            self._pending.append((step, finite, outputs, (batch, None)))
        while len(self._pending) > (1 if on_device else 0):
            self._judge()

    def flush(self) -> None:
        """Judges what is still open."""
        while self._pending:
            self._judge()

    def _judge(self) -> None:
        step, finite, outputs, (batch, event) = self._pending.popleft()
        if event is not None:
            event.synchronize()
        if bool(finite):
            return
        terms = {name: float(value) for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        samples = _names(batch)
        path = self.runner.save_debug_state(step, terms, batch)
        listed = ", ".join(f"{name}={value:.6g}" for name, value in terms.items())
        raise NonFiniteLoss(
            f"the loss of step {step} is not finite: {listed}\n"
            f"samples: {samples if samples is not None else 'the batch holds no sample_id'}\n"
            f"model, optimizer and batch are saved in {path}; earlier checkpoints are untouched"
        )


def _names(batch: Any) -> list[str] | None:
    """The batch's sample ids, or the image files of an OpenMMLab batch."""
    if not isinstance(batch, dict):
        return None
    if "data_samples" in batch:
        return [str(getattr(s, "img_path", getattr(s, "img_id", "?"))) for s in batch["data_samples"]]
    return batch.get("sample_id")
