"""The evaluation loop: every sample exactly once, on any number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.runner import BaseLoop

from core.config.command.processes import largest, total
from core.config.command.signals import Interrupted, StopRequest
from core.config.registry import LOOPS
from core.data.loading.batch import LoadedBatch
from core.data.loading.seeded import SeededDataset
from core.engine.state.randomness import fixed_randomness
from core.errors import ConfigError
from core.metrics.predictions import MetricError
from core.trainer import Trainer, unwrap

EVALUATION_SEED = 20230308  # any constant: evaluation that samples repeats from run to run


@LOOPS.register_module()
class EvalLoop(BaseLoop):
    """Evaluates every sample of a loader exactly once and leaves random states and training mode as they were.

    Args:
        runner: the mmengine Runner.
        dataloader: config or DataLoader.
        evaluator: the Runner's evaluator config (a metric, or a list of metrics).
        split: "val" or "test": which hook points are called.
    """

    builds_its_own = True

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, split: str = "val") -> None:
        super().__init__(runner, dataloader)
        self.evaluator = runner.build_evaluator(evaluator)
        self._prepare_metrics()
        self.split = split
        self._derived = False
        self.metrics: dict[str, Any] = {}
        self.left_out: list[str] = []  # metrics that the last evaluation, a trial's, could not compute

    def _prepare_metrics(self) -> None:
        """mmengine's metrics want the data set's classes, and a folder that every process can write to."""
        meta = getattr(self.dataloader.dataset, "metainfo", None)
        if meta is not None:
            self.evaluator.dataset_meta = meta
        for metric in self.evaluator.metrics:
            if getattr(metric, "collect_device", None) == "cpu" and getattr(metric, "collect_dir", "") is None:
                metric.collect_dir = os.path.join(self.runner.work_dir, ".collect")

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The metrics, by name."""
        runner, split = self.runner, self.split
        was_training = runner.model.training
        runner.reconcile_buffers()
        runner.call_hook(f"before_{split}")
        runner.call_hook(f"before_{split}_epoch")
        runner.model.eval()
        with fixed_randomness(EVALUATION_SEED):
            skipped = total(self._run_batches())
            self.metrics = self._compute()
        if skipped:
            self.metrics["skipped_samples"] = skipped
        runner.call_hook(f"after_{split}_epoch", metrics=self.metrics)
        runner.call_hook(f"after_{split}")
        runner.model.train(was_training)
        return self.metrics

    def _run_batches(self) -> int:
        """Every process takes equally many rounds, so that all of them agree on stopping after each."""
        runner, split = self.runner, self.split
        self._derive_data()
        skipped, batch = 0, None
        batches = iter(self._batches())
        for index in range(self._rounds()):
            fetched = next(batches, LoadedBatch(None, []))
            for error in fetched.errors:
                skipped += 1
                runner.logger.warning(f"sample left out of the evaluation ({skipped} so far): {error}")
            if fetched.data is None:
                self.keep_company(batch)
            else:
                batch = fetched.data
                runner.call_hook(f"before_{split}_iter", batch_idx=index, data_batch=batch)
                with runner.autocast():
                    outputs = runner.model.val_step(batch)
                self._process(batch, outputs)
                runner.call_hook(f"after_{split}_iter", batch_idx=index, data_batch=batch, outputs=outputs)
            self._stop_if_asked(first=index == 0)
        if next(batches, None) is not None:
            raise ConfigError(f"{split}_dataloader has more batches than the {len(self.dataloader)} that it says")
        return skipped

    def _derive_data(self) -> None:
        """Puts what the trainer derives in the data set's place, once: loops are built before weights are loaded."""
        trainer, samples = unwrap(self.runner.model), getattr(self.dataloader, "dataset", None)
        if self._derived or not isinstance(trainer, Trainer) or not isinstance(samples, SeededDataset):
            return
        self._derived = True
        derived = trainer.evaluation_data(samples.dataset)
        if derived is not samples.dataset:
            samples.dataset = derived
            self.dataloader.close()  # workers that were started before have the former one

    def _rounds(self) -> int:
        """Batches of the process that has most.

        Raises:
            ConfigError: the loader never ends.
        """
        try:
            return largest(len(self.dataloader))
        except TypeError as error:
            raise ConfigError(f"{self.split}_dataloader: {error}; an evaluation has to end") from None

    def _stop_if_asked(self, first: bool) -> None:
        stop = StopRequest.current()
        if stop is not None and stop.deferring and stop.requested(afresh=first):
            step = self.runner.iter
            raise Interrupted(
                self.runner.farewell(f"in the validation of step {step}" if self.split == "val" else "in the test")
            )

    def _batches(self) -> Iterable[Any]:
        self.dataloader.set_epoch(0)
        return self.runner.prefetcher(self.dataloader)

    def _process(self, batch: Any, outputs: Any) -> None:
        if isinstance(outputs, dict):
            for metric in self.evaluator.metrics:
                metric.process(batch, outputs)
        else:
            self.evaluator.process(data_samples=outputs, data_batch=batch)

    def keep_company(self, batch: Any) -> None:
        """Sharded networks gather parameters in every forward pass, so all processes must run equally many."""
        if self.runner.sharded:
            if batch is None:
                raise ConfigError("a process got no sample to evaluate: use fewer processes or a larger split")
            self.runner.model.val_step(batch)

    def _compute(self) -> dict[str, Any]:
        """The figures; in a trial that has not seen the whole set, without those that so few samples do not give."""
        size, whole = getattr(self.dataloader, "samples", None), len(self.dataloader.dataset)
        if few := size is not None and size < whole:
            self.runner.logger.info(f"{self.split}: evaluated on {size} of {whole} samples")
        self.left_out = []
        metrics: dict[str, Any] = {}
        for metric in self.evaluator.metrics:
            if hasattr(metric, "partial"):
                metric.partial = few
            try:
                metrics.update(metric.evaluate(whole if size is None else size))
            except Exception as error:
                # Of several processes, others may wait for a figure that this one does not compute.
                if not few or (self.runner.world_size > 1 and not isinstance(error, MetricError)):
                    raise
                getattr(metric, "results", []).clear()
                self.left_out.append(type(metric).__name__)
                self.runner.logger.warning(
                    f"{type(metric).__name__} cannot be computed of {size} of {whole} samples: "
                    f"{type(error).__name__}: {error}"
                )
        return metrics
