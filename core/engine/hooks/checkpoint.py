"""When the run's state is saved."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from core.checkpoint.selection import Direction, Metric, ranking
from core.config.registry import HOOKS
from core.errors import ConfigError


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Saves the whole state every `every_steps` steps, or at the end of every n-th epoch, and always at the end.

    What is evaluated is saved first, so that no evaluation can lose training; the metrics then join the checkpoint's
    entry in ``checkpoints/index.json``. A checkpoint that was written for that alone stays until the next one, unless
    it is one of the best.

    Args:
        every_steps: steps from one checkpoint to the next; None: at ends of epochs.
        every_epochs: epochs from one checkpoint to the next; None: every epoch, unless `every_steps` is given.
        keep_last: how many of the newest checkpoints stay; None: all.
        keep_best: how many of the best by every metric stay.
        metric: name of the evaluation metric that "best" means, or several (a list, or a mapping NAME: "higher" |
            "lower"), of which the first decides where one is asked for; None: no best.
        direction: "higher" or "lower" is better, where `metric` does not say.

    Raises:
        ConfigError: both `every_steps` and `every_epochs`, or one that is not a whole number from 1 on; what
            `core.checkpoint.selection.ranking` refuses.
    """

    priority = "LOWEST"

    def __init__(
        self,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        keep_last: int | None = 2,
        keep_best: int = 1,
        metric: Metric = None,
        direction: Direction = "higher",
    ) -> None:
        if every_steps is not None and every_epochs is not None:
            raise ConfigError(
                f"checkpoint: give every_steps or every_epochs, not both (they are {every_steps} and {every_epochs}; "
                "null leaves one out)"
            )
        for key, every in (("every_steps", every_steps), ("every_epochs", every_epochs)):
            if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
                raise ConfigError(f"checkpoint.{key}={every}: a whole number from 1 on, or null")
        self.every_steps = every_steps
        self.every_epochs = None if every_steps is not None else every_epochs or 1
        self.keep_last, self.keep_best = keep_last, keep_best
        self.metric, self.direction = metric, direction
        self.ranking = ranking(metric, direction)

    def after_step(self, runner: Any) -> None:
        """The engine's own hook point: the step is counted, and not evaluated yet."""
        self._save(runner, self.every_steps is not None and runner.iter % self.every_steps == 0)

    def after_epoch_state(self, runner: Any) -> None:
        """The engine's own hook point: the epoch is counted, and not evaluated yet."""
        self._save(runner, self.every_epochs is not None and runner.epoch % self.every_epochs == 0)

    def _save(self, runner: Any, due: bool) -> None:
        if due or runner.train_loop.evaluation_due:
            runner.save_state(interim=not due)

    def before_last_evaluation(self, runner: Any) -> None:
        """The engine's own hook point: the last state is always kept, and not being able to write it is an error."""
        runner.save_state(must=True)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Adds the figures to the checkpoint that holds these weights.

        Raises:
            ConfigError: a `metric` is not among them, though all were computed.
        """
        numbers = sorted(k for k, v in (metrics or {}).items() if isinstance(v, int | float))
        for metric in self.ranking:
            if metric not in numbers and not getattr(runner.val_loop, "left_out", ()):
                raise ConfigError(f"checkpoint.metric '{metric}' is none of {numbers}")
        runner.annotate_state(metrics or {})
