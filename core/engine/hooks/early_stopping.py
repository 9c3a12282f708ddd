"""A training ends when a figure of its evaluations no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.dist import broadcast_object_list
from mmengine.hooks import Hook

from core.checkpoint.selection import Direction, ranking
from core.config.registry import HOOKS
from core.errors import ConfigError


@HOOKS.register_module()
class EarlyStopping(Hook):
    """Ends the training after `patience` evaluations in a row in which `metric` was not better than its best so far.

    The run ends as it would at its last step: the state is saved, the test split is evaluated (with ``evaluate=best``,
    on the best checkpoint), and ``result.json`` says ``finished`` and, under ``stopped_early``, why there are fewer
    steps. Counts are saved with every checkpoint, so that a resumed run stops where an uninterrupted one does; of
    several processes the first decides.

    Args:
        metric: a figure of the validation; None: the first one of the config's ``checkpoint.metric``.
        direction: whether "higher" or "lower" is better; None: what ``checkpoint`` says of that metric, else "higher".
        patience: evaluations without an improvement after which the training ends.
        min_delta: a smaller improvement does not count.

    Raises:
        ConfigError: a `patience` below 1, a negative `min_delta` or an unknown `direction`; at the start of a training
            that names no metric, or has no evaluations before its end; at an evaluation that does not give the metric.
    """

    def __init__(
        self,
        metric: str | None = None,
        direction: Direction | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        if patience < 1 or min_delta < 0:
            raise ConfigError(
                f"EarlyStopping: patience={patience}, min_delta={min_delta}: the first is at least 1, the second 0"
            )
        ranking(metric, "higher" if direction is None else direction)
        self.metric, self.direction = metric, direction
        self.patience, self.min_delta = patience, min_delta
        self._best: float | None = None
        self._best_step = self._waited = 0
        self._training = False

    def before_train(self, runner: Any) -> None:
        """Settles the metric, and stops at once if the run that goes on had been stopped."""
        settings = runner.settings["checkpoint"]
        chosen = ranking(settings["metric"], settings["direction"])
        self.metric = self.metric or next(iter(chosen), None)
        self.direction = self.direction or chosen.get(self.metric or "", "higher")
        if self.metric is None:
            raise ConfigError("EarlyStopping watches no metric: set its `metric`, or checkpoint.metric")
        loop = runner.train_loop
        if runner.val_loop is None:
            raise ConfigError(f"EarlyStopping watches {self.metric}, but there is no val_dataloader to evaluate")
        if not (getattr(loop, "val_every_epochs", True) or getattr(loop, "val_every_steps", True)):
            raise ConfigError(
                f"EarlyStopping watches {self.metric}, but only the last step is evaluated: set "
                "train_cfg.val_every_epochs or train_cfg.val_every_steps"
            )
        self._training = True
        self._stop_if_due(runner)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Counts an evaluation; the loop ends after the step, or the epoch, that it belongs to."""
        if not self._training or getattr(runner.val_loop, "left_out", ()):  # a trial's, without all figures
            return
        value = _number(metrics or {}, self.metric)
        if self._best is None or self._gain(value) > self.min_delta:
            self._best, self._best_step, self._waited = value, runner.iter, 0
        else:
            self._waited += 1
        self._stop_if_due(runner)

    def after_train(self, runner: Any) -> None:
        """What is evaluated from here on is not counted."""
        self._training = False

    def _gain(self, value: float) -> float:
        """How much better `value` is than the best; a NaN is never better."""
        assert self._best is not None
        if self._best != self._best:
            return float("inf") if value == value else float("nan")
        return value - self._best if self.direction == "higher" else self._best - value

    def _stop_if_due(self, runner: Any) -> None:
        if self._waited < self.patience or runner.iter >= runner.max_iters:
            return
        reason = f"{self.metric} has not improved on {self._best:.6g} of step {self._best_step}"
        runner.train_loop.stop_training = True
        runner.train_loop.stop_reason = f"{reason} in {self._waited} evaluations"
        runner.logger.info(f"training stops at step {runner.iter}: {runner.train_loop.stop_reason}")

    def state_dict(self) -> dict[str, Any]:
        """The best value, its step, and the evaluations since."""
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting."""
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]


def _number(metrics: Mapping[str, Any], name: Any) -> float:
    """The metric on the first process, for all of them."""
    value = metrics.get(name)
    shared = [float(value) if isinstance(value, int | float) or hasattr(value, "item") else None]
    broadcast_object_list(shared)
    if shared[0] is None:
        known = sorted(k for k, v in metrics.items() if isinstance(v, int | float))
        raise ConfigError(f"EarlyStopping: the evaluation gives no number '{name}'; there are {known}")
    return shared[0]
