"""The training loop, with an exact position: step, epoch, and batches taken of the epoch.

It keeps mmengine's hook points and counters, so its hooks work in it. A batch goes this way, and through no other file
of core (a test traces it):

1. core.data.loading.batch      samples become a batch
2. core.data.loading.loader     hands it over, from a worker or from this process
3. core.data.loading.prefetch   brings it to the device during the step before, by way of
4. core.data.loading.tree       which finds the tensors in it
5. core.engine.loops.train      `TrainLoop._run_step`: one step, and the hooks that look on
6. core.trainer                 `train_step` and `phase`: the paper's ``losses(batch)``, and their sum
7. core.optim.wrapper           takes the loss: backward pass, clipping, the optimizer's step
8. core.engine.hooks.finite     looks whether the losses are finite, and names the batch's samples where they are not
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.runner import BaseLoop

from core.checkpoint.files import storable
from core.config.command.processes import total
from core.config.command.signals import Interrupted, StopRequest
from core.config.fingerprint import digest
from core.config.registry import LOOPS
from core.config.shortened import limits
from core.data.loading.position import joint_batch, place
from core.engine.hooks.finite import FiniteCheck
from core.engine.loops.sanity import check_evaluations
from core.errors import ConfigError


@LOOPS.register_module()
class TrainLoop(BaseLoop):
    """Trains for `max_epochs` or `max_steps` and can go on from any step.

    Args:
        runner: the mmengine Runner.
        dataloader: config or DataLoader of ``core.data.build_loader``.
        max_epochs: length in passes over the data.
        max_steps: length in steps (micro-steps under gradient accumulation); needed for an endless sampler.
        val_every_epochs: evaluate at the end of every n-th epoch.
        val_every_steps: evaluate after every n-th step. Without either, only the last step is evaluated (it always is).
        val_begin: no evaluation before this epoch or step.

    Raises:
        ConfigError: neither or both lengths are given, or the loader is empty.
    """

    builds_its_own = True

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        val_every_epochs: int | None = None,
        val_every_steps: int | None = None,
        val_begin: int = 1,
    ) -> None:
        super().__init__(runner, dataloader)
        if (max_epochs is None) == (max_steps is None):
            raise ConfigError("train_cfg: give exactly one of max_epochs and max_steps")
        if val_every_epochs is not None and val_every_steps is not None:
            raise ConfigError("train_cfg: give val_every_epochs or val_every_steps, not both")
        given_epochs = max_epochs is not None
        self.steps_per_epoch = self._steps_per_epoch()
        if max_epochs is not None:
            if self.steps_per_epoch is None:
                raise ConfigError("train_cfg: an endless sampler needs max_steps")
            max_steps = max_epochs * self.steps_per_epoch
        elif self.steps_per_epoch is not None:
            max_epochs = -(-max_steps // self.steps_per_epoch)
        self._in_epochs = given_epochs
        self._fast = limits(runner.runtime).fast
        self._whole = self._unlimited(max_steps, max_epochs)
        self._max_steps, self._max_epochs = self._cut(max_steps), max_epochs or 1
        if self._fast is not None and self.steps_per_epoch:
            self._max_epochs = -(-self._max_steps // self.steps_per_epoch)
        self.val_every_epochs, self.val_every_steps, self.val_begin = val_every_epochs, val_every_steps, val_begin
        self.val_interval = val_every_epochs or val_every_steps or self._max_steps  # mmengine's hooks read it
        self._iter = self._epoch = self.batches_taken = 0
        self.skipped_samples = 0
        self._evaluated_at = -1
        self.evaluation_due = False
        self.stop_training = False
        self.stop_reason: str | None = None  # of the hook that sets `stop_training`, for the result

    def _steps_per_epoch(self) -> int | None:
        try:
            steps = len(self.dataloader)
        except TypeError:
            return None
        if steps == 0:
            raise ConfigError("train_dataloader gives no batch: fewer samples than batch_size and drop_last is on?")
        return steps

    def _unlimited(self, max_steps: int, max_epochs: int | None) -> tuple[int, int | None]:
        """Steps of the training, and of an epoch, without limits."""
        per_epoch = getattr(getattr(self.dataloader, "batch_sampler", None), "whole", self.steps_per_epoch)
        return (max_epochs * per_epoch if self._in_epochs and per_epoch else max_steps), per_epoch

    @property
    def planned(self) -> tuple[int, int | None]:
        """Steps of the training and of an epoch as schedules count them: those of the whole run in a fast dev run."""
        return (self._max_steps, self.steps_per_epoch) if self._fast is None else self._whole

    def _cut(self, steps: int) -> int:
        return steps if self._fast is None else min(steps, self._fast)

    @property
    def max_epochs(self) -> int:
        """Length in epochs (rounded up)."""
        return self._max_epochs

    @property
    def max_iters(self) -> int:
        """Length in steps."""
        return self._max_steps

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self._epoch

    @property
    def iter(self) -> int:
        """Finished steps."""
        return self._iter

    def state_dict(self) -> dict[str, Any]:
        """The position, whether these weights are still to be evaluated (they are saved before), the last figures.

        Collective: every process has to call it.
        """
        val = getattr(self.runner, "_val_loop", None)
        return {
            "iter": self._iter,
            "epoch": self._epoch,
            "batches_taken": self.batches_taken,
            "steps_per_epoch": self.steps_per_epoch,
            "joint_batch": joint_batch(self.dataloader),
            "skipped_samples": total(self.skipped_samples),
            "evaluated_at": self._evaluated_at,
            "evaluation_due": self.evaluation_due,
            "stop_training": bool(self.stop_training),
            "stopping": self._stopping(),
            "max_steps": self._max_steps,
            "val_metrics": storable(getattr(val, "metrics", {})),
            "evaluation": self._evaluation(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position; figures of another evaluation than this run's are forgotten.

        Raises:
            ConfigError: more is done than the run is long.
        """
        self._iter = state["iter"]
        self.skipped_samples = state["skipped_samples"] if is_main_process() else 0  # the first keeps what all counted
        self._epoch, self.batches_taken, said = place(state, self.dataloader, self.steps_per_epoch)
        if said:
            self.runner.logger.warning(said)
        if self._in_epochs:
            left = (self._max_epochs - self._epoch) * self.steps_per_epoch - self.batches_taken
            self._max_steps = self._cut(self._iter + left)
        if self._iter > self._max_steps:
            raise ConfigError(
                f"train_cfg: {self._iter} steps are done, and the run has {self._max_steps}: make it longer"
            )
        same_end = state.get("max_steps", self._max_steps) == self._max_steps
        if same_end and state.get("stopping", self._stopping()) == self._stopping():
            self.stop_training = state.get("stop_training", False)
        self.evaluation_due = state.get("evaluation_due", False)
        if state.get("evaluation", self._evaluation()) == self._evaluation():
            self._evaluated_at = state["evaluated_at"]
            if hasattr(self.runner.val_loop, "metrics"):
                self.runner.val_loop.metrics = dict(state.get("val_metrics") or {})

    def _evaluation(self) -> str:
        """A digest of what the run is evaluated with."""
        return digest({key: self.runner.settings[key] for key in ("val_dataloader", "val_evaluator", "val_cfg")})

    def _stopping(self) -> str:
        """A digest of the hooks, one of which may have stopped the run: with others it goes on."""
        return digest({"custom_hooks": self.runner.settings["custom_hooks"]})

    def run(self) -> torch.nn.Module:
        """Trains to the end.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
        """
        runner = self.runner
        if self._iter == 0:
            check_evaluations(runner, 0 if self._fast else int(runner.runtime.get("sanity_batches", 2)))
        runner.call_hook("before_train")
        self._finite = FiniteCheck(runner)
        self._finite.watch(runner.optim_wrapper)
        with contextlib.ExitStack() as stack:
            self._stop = StopRequest.current() or stack.enter_context(StopRequest())
            if runner.world_size > 1:
                self._stop.defer()
            try:
                self._evaluate_first()
                while not self._is_over():
                    self._run_epoch()
                self._finite.flush()
            finally:
                if hasattr(self.dataloader, "close"):
                    self.dataloader.close()
            self._end()
        return runner.model

    def confirm(self) -> None:
        """Looks at the steps whose losses and gradients are still on their way from the device.

        Raises:
            core.engine.hooks.finite.NonFiniteLoss, core.engine.hooks.finite.NonFiniteGradient: these weights are not
            worth keeping.
        """
        if self._finite is not None:
            self._finite.flush()

    def _is_over(self) -> bool:
        """Whether no step is left, and no epoch whose last step is done has still to be ended."""
        return (self.stop_training or self._iter >= self._max_steps) and self.batches_taken != self.steps_per_epoch

    def _evaluate_first(self) -> None:
        """Where the run was stopped between saving a state and evaluating it: hooks draw what they would have drawn."""
        if self.evaluation_due:
            self.runner.restore_random_state()
            self._evaluate()
            self.runner.keep_random_state()  # making the data iterator may draw

    def _end(self) -> None:
        """The last weights are saved, evaluated if they have not been, and training is over."""
        self._stop.defer()
        self.evaluation_due = self._evaluated_at != self._iter and self.runner.val_loop is not None
        self.runner.call_hook("before_last_evaluation")
        self._evaluate()
        self.runner.call_hook("after_train")

    def _run_epoch(self) -> None:
        runner = self.runner
        if self.batches_taken == 0:
            runner.restore_random_state()
        runner.call_hook("before_train_epoch")  # before the workers start: it may change the data set
        batches = self._batches()
        runner.restore_random_state()  # within an epoch, what its beginning draws has been drawn before
        runner.model.train()
        exhausted = True
        for batch in batches:
            self._run_step(batch)
            if self._iter >= self._max_steps or self.stop_training:
                exhausted = self.steps_per_epoch == self.batches_taken
                break
        if exhausted or self.steps_per_epoch is None:
            self._stop.defer()
            runner.call_hook("after_train_epoch")
            self._epoch += 1
            self.batches_taken = 0
            if self.val_every_epochs:
                self._note_due(self._epoch, self.val_every_epochs)
            runner.call_hook("after_epoch_state")
            self._evaluate()

    def _batches(self) -> Iterator[Any]:
        loader = self.dataloader
        loader.set_epoch(self._epoch)
        loader.skip_batches(self.batches_taken)
        return iter(self.runner.prefetcher(loader))

    def _run_step(self, fetched: Any) -> None:
        runner, index = self.runner, self.batches_taken
        self._stop.defer()  # until the first batch is there, nothing is lost by leaving at once
        batch = fetched.data
        self._report(fetched.errors)
        runner.message_hub.update_info("iter", self._iter)
        runner.message_hub.update_info("epoch", self._epoch)
        runner.call_hook("before_train_iter", batch_idx=index, data_batch=batch)
        outputs = _detached(runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper))
        self._finite.check(self._iter, outputs, batch)
        runner.call_hook("after_train_iter", batch_idx=index, data_batch=batch, outputs=outputs)
        self._iter += 1
        self.batches_taken += 1
        if self.val_every_steps:
            self._note_due(self._iter, self.val_every_steps)
        runner.call_hook("after_step")
        self._evaluate()
        if self._stop.requested():
            runner.save_state(interim=True)
            raise Interrupted(runner.farewell(f"at step {self._iter}"))

    def _report(self, errors: Sequence[Any]) -> None:
        for error in errors:
            self.skipped_samples += 1
            self.runner.logger.warning(f"sample left out ({self.skipped_samples} so far): {error}")

    def _note_due(self, count: int, every: int) -> None:
        """Whether these weights are to be evaluated: known before they are saved, done after."""
        due = count >= self.val_begin and count % every == 0
        self.evaluation_due = due and self._evaluated_at != self._iter and self.runner.val_loop is not None

    def _evaluate(self) -> None:
        if self.evaluation_due:
            self.runner.val_loop.run()
            self._evaluated_at, self.evaluation_due = self._iter, False
            self.runner.model.train()


def _detached(outputs: dict[str, Any]) -> dict[str, Any]:
    """Loss terms that no longer hold the graph; OpenMMLab's models return them attached."""
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
