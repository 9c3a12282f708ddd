"""Learning rates that grow from update to update, and the losses that they give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook

from core.config.registry import HOOKS
from core.engine.commands.lr_curve import DIVERGED, FIRST, judge
from core.errors import ConfigError, nearest


@HOOKS.register_module()
class LRSweep(Hook):
    """Sets the rate before every update, notes the update's loss, and ends the training when the sweep is over.

    Args:
        low: first rate.
        high: last rate.
        steps: updates from `low` to `high`.
        part: of several optimizers, the one that is swept; the others keep their rates.
        loss: the term that is watched.

    Attributes:
        rates: of the updates so far.
        losses: of these, means over micro-steps and processes.
        rate: the one in use.
        diverged: the rate at which the smoothed loss left its lowest value far behind; None: it did not.
    """

    priority = "VERY_LOW"

    def __init__(self, low: float, high: float, steps: int, part: str | None = None, loss: str = "loss") -> None:
        self.low, self.high, self.steps, self.part, self.loss = low, high, steps, part, loss
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.rate = low
        self.diverged: float | None = None
        self._wrapper: Any = None
        self._terms: list[float] = []
        self._updates = 0

    def before_train(self, runner: Any) -> None:
        """Chooses the optimizer."""
        wrappers = dict(runner.optim_wrapper.items()) if hasattr(runner.optim_wrapper, "optim_wrappers") else {}
        if not wrappers and self.part is not None:
            raise ConfigError(f"part={self.part}: the experiment has one optimizer, without a name")
        if wrappers and self.part not in wrappers:
            near = nearest(self.part, wrappers) if self.part else ""
            raise ConfigError(f"part={self.part}{near}; choose one of the optimizers: {', '.join(wrappers)}")
        self._wrapper = wrappers[self.part] if wrappers else runner.optim_wrapper

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The rate of the update that this step belongs to."""
        self.rate = self.low * (self.high / self.low) ** (len(self.rates) / (self.steps - 1))
        for group in self._groups():
            group["lr"] = self.rate * group.get("lr_scale", 1.0)

    def _groups(self) -> Iterator[dict[str, Any]]:
        return iter(self._wrapper.optimizer.param_groups)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """Notes the loss; ends the training behind the last rate, or where the loss runs away."""
        terms = {
            name: value for name, value in (outputs or {}).items() if isinstance(value, int | float | torch.Tensor)
        }
        if self.loss not in terms:
            raise ConfigError(f"loss={self.loss}{nearest(self.loss, terms)} (the steps give {', '.join(terms)})")
        value = torch.as_tensor(terms[self.loss]).detach().double().mean()
        all_reduce(value, op="mean")
        self._terms.append(float(value))
        if self._wrapper.updates == self._updates:  # within a window of accumulation
            return
        self._updates = self._wrapper.updates
        self.rates.append(self.rate)
        self.losses.append(sum(self._terms) / len(self._terms))
        self._terms = []
        smoothed = judge(self.rates, self.losses).smoothed
        ran_away = smoothed[-1] > DIVERGED * min(smoothed) if min(smoothed) > 0 else False
        if (ran_away and len(smoothed) > FIRST) or not math.isfinite(smoothed[-1]):
            self.diverged = self.rate
        if self.diverged is not None or len(self.rates) >= self.steps:
            runner.train_loop.stop_training = True
