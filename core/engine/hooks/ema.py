"""A moving average of all trained weights, used wherever the run evaluates."""

from __future__ import annotations

from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook

from core.config.registry import HOOKS
from core.data.loading.batch import batch_size
from core.errors import ConfigError
from core.optim.ema import EMA, check_options
from core.trainer import unwrap


@HOOKS.register_module()
class EMAHook(Hook):
    """Averages the trainer's trained parameters after every optimizer update and evaluates with the average.

    Validation and test see the averaged weights; training goes on with its own. Checkpoints hold both: ``model`` the
    trained weights, this hook's ``average`` the averaged ones by the same names, which inference prefers.

    Args:
        decay, half_life, ramp, warmup, every, buffers: see `core.optim.ema.EMA`. Updates are the optimizer's (those of
            the busiest one if there are several), never micro-steps of an accumulation.

    Raises:
        ConfigError: arguments that cannot be meant; an optimizer wrapper that does not count its updates.
    """

    priority = "NORMAL"  # before checkpoints and logs of the same moment
    evaluation_weights = True  # its state belongs to the weights: `Runner.use_best` restores both

    def __init__(
        self,
        decay: float | None = None,
        half_life: float | None = None,
        ramp: float | None = None,
        warmup: str = "none",
        every: int = 1,
        buffers: str = "copy",
    ) -> None:
        self.options: dict[str, Any] = {
            "decay": decay,
            "half_life": half_life,
            "ramp": ramp,
            "warmup": warmup,
            "every": every,
            "buffers": buffers,
        }
        check_options(**self.options)
        self.ema: EMA | None = None
        self._seen = 0  # optimizer updates already averaged
        self._batch = 0  # samples since then, over all processes
        self._restored: dict[str, Any] | None = None

    def before_train(self, runner: Any) -> None:
        """Begins from the weights as loaded, or goes on from a checkpoint's average."""
        if not hasattr(runner.optim_wrapper, "updates"):
            raise ConfigError(
                f"EMA needs an optimizer wrapper that counts updates (core.OptimWrapper), "
                f"not {type(runner.optim_wrapper).__name__}"
            )
        self._build(runner)
        if self._restored is None:
            self._seen = runner.optim_wrapper.updates
        self._restored = None

    def _build(self, runner: Any) -> None:
        self.ema = EMA(unwrap(runner.model), **self.options)
        if self._restored is not None:
            self.ema.load_state_dict(self._restored["ema"])
            self._seen, self._batch = self._restored["seen"], self._restored["batch"]

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Averages if this iteration updated the weights."""
        self._batch += batch_size(data_batch) * get_world_size()
        updates = runner.optim_wrapper.updates
        if updates > self._seen:
            self.ema.update(self._batch)
            self._seen, self._batch = updates, 0

    def before_val_epoch(self, runner: Any) -> None:
        """Averaged weights in."""
        if self.ema is None and self._restored is not None:
            self._build(runner)
        if self.ema is not None:
            self.ema.swap_in()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Trained weights back."""
        if self.ema is not None and self.ema.swapped_in:
            self.ema.swap_out()

    def before_test_epoch(self, runner: Any) -> None:
        """Averaged weights in."""
        self.before_val_epoch(runner)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Trained weights back."""
        self.after_val_epoch(runner)

    def state_dict(self) -> dict[str, Any]:
        """The average under ``average`` (by names of the trainer's state dict) and the counters."""
        if self.ema is None:
            if self._restored is None:
                return {}
            ema, seen, batch = self._restored["ema"], self._restored["seen"], self._restored["batch"]
        else:
            ema, seen, batch = self.ema.state_dict(), self._seen, self._batch
        counters = {name: count for name, count in ema.items() if name != "average"}
        return {"average": ema["average"], "counters": counters, "seen": seen, "batch": batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a checkpoint's average: at once while a run goes on, else when the model's weights are in place."""
        if not state:
            return
        ema = {"average": state["average"], **state["counters"]}
        if self.ema is not None:
            self.ema.load_state_dict(ema)
            self._seen, self._batch = state["seen"], state["batch"]
        else:
            self._restored = {"ema": ema, "seen": state["seen"], "batch": state["batch"]}
