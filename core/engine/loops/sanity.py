"""A look at every evaluation before training: a bug in it shows at once, not after the first epoch.

``runtime.sanity_batches`` batches of every evaluation set go through ``predict`` and the metrics. Nothing of the run is
touched: the metrics are copies, randomness is put back, no hook is called and nothing is logged.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from core.config.command.processes import alone, first_decides, largest
from core.data.loading.loader import Loader
from core.engine.loops.evaluation import EVALUATION_SEED, EvalLoop
from core.engine.state.randomness import fixed_randomness
from core.errors import ConfigError
from core.trainer import unwrap


def check_evaluations(runner: Any, batches: int) -> None:
    """Evaluates the first batches of every set and throws the result away.

    A trainer whose ``predict`` takes long says ``sanity_check = False``. Figures are those of the first process's
    samples, computed without the others, which would wait where one fails; one that cannot be computed of so little is
    a warning.

    Args:
        runner: built, with the weights that training begins with.
        batches: of every set; 0: nothing is checked.

    Raises:
        ConfigError: ``checkpoint.metric`` is not among the figures of the validation, on every process.
        Exception: what reading the data, ``predict`` or a metric's ``process`` raised.
    """
    if batches < 1 or not getattr(unwrap(runner.model), "sanity_check", True):
        return
    was_training = runner.model.training
    runner.model.eval()
    validated = []
    try:
        for split, name, loop in _loops(runner):
            with torch.no_grad(), fixed_randomness(EVALUATION_SEED):
                metrics = _copies(runner, loop)
                _process(runner, loop, metrics, batches)
                figures = first_decides(lambda loop=loop, metrics=metrics: _compute(runner, loop, metrics))
            if split == "val":
                validated.append((name, loop, figures))
    finally:
        runner.model.train(was_training)
    _check_ranking(runner, validated)


def _loops(runner: Any) -> Iterator[tuple[str, str, EvalLoop]]:
    """Split, name of the set (empty where there is one) and loop of every set that is evaluated."""
    for split in ("val", "test"):
        loop = getattr(runner, f"{split}_loop")
        for name, part in getattr(loop, "parts", {"": loop}).items():
            if isinstance(part, EvalLoop) and isinstance(part.dataloader, Loader):
                yield split, name, part


def _copies(runner: Any, loop: EvalLoop) -> list[Any] | None:
    try:
        return copy.deepcopy(list(loop.evaluator.metrics))
    except Exception as error:  # a metric may hold a file or a connection
        runner.logger.warning(f"the metrics of {loop.split} cannot be copied, so they are not tried out: {error}")
        return None


def _process(runner: Any, loop: EvalLoop, metrics: list[Any] | None, count: int) -> None:
    loader, batch = loop.dataloader, None
    loader.set_epoch(0)
    drawn = iter(itertools.islice(loader.batch_sampler, count))
    for _ in range(min(count, largest(len(loader)))):
        indices = next(drawn, None)
        fetched = None if indices is None else loader.collate_fn(loader.dataset.__getitems__(indices))
        if hasattr(fetched, "error"):
            raise fetched.error
        if fetched is None or fetched.data is None:
            loop.keep_company(batch)
            continue
        batch = next(iter(runner.prefetcher([fetched]))).data
        with runner.autocast():
            outputs = runner.model.val_step(batch)
        if metrics is None:
            continue
        with _quiet():
            if isinstance(outputs, dict):
                for metric in metrics:
                    metric.process(batch, outputs)
            else:
                copied = copy.copy(loop.evaluator)
                copied.metrics = metrics
                copied.process(data_samples=outputs, data_batch=batch)


def _compute(runner: Any, loop: EvalLoop, metrics: list[Any] | None) -> dict[str, bool] | None:
    """The figures' names, and whether each is a number; None where one cannot be computed of so few samples."""
    figures: dict[str, Any] = {}
    for metric in metrics or ():
        try:
            with _quiet(), alone():
                figures.update(metric.evaluate(len(loop.dataloader.dataset)))
        except Exception as error:
            runner.logger.warning(
                f"{type(metric).__name__} cannot be computed of the first batches of {loop.split}, which may be too "
                f"few for it: {type(error).__name__}: {error}"
            )
            return None
    return None if metrics is None else {name: isinstance(value, int | float) for name, value in figures.items()}


def _check_ranking(runner: Any, validated: list[tuple[str, EvalLoop, dict[str, bool] | None]]) -> None:
    """Holds ``checkpoint.metric`` against the figures of the validation sets.

    A name with a slash is refused if no samples whatever give it: figures of groups and classes are there for those
    that have occurred.

    Raises:
        ConfigError: no validation gives the metric.
    """
    sets = {name: (loop, found) for name, loop, found in validated if found is not None}
    if len(sets) < len(validated) or not sets:
        return
    numbers = [f"{name}/{one}".lstrip("/") for name, (_, found) in sets.items() for one in sorted(found) if found[one]]
    for metric in runner.store.ranking:
        if metric in numbers:
            continue
        name, _, figure = ("", "", metric) if "" in sets else metric.partition("/")
        loop, found = sets.get(name, (None, {}))
        if "/" in figure and loop is not None and _may_occur(figure, loop.evaluator.metrics, found):
            runner.logger.warning(f"checkpoint.metric '{metric}' is not a figure of the first batches: {numbers}")
        else:
            raise ConfigError(f"checkpoint.metric '{metric}' is none of {numbers}")


def _may_occur(figure: str, metrics: list[Any], found: dict[str, bool]) -> bool:
    """Whether other samples may give a figure that the first batches have not given."""
    above = itertools.accumulate(figure.split("/")[:-1], "{}/{}".format)
    if any(name in found for name in above):  # one number, and so not several
        return False
    return any(getattr(metric, "may_report", lambda name: True)(figure) for metric in metrics)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what metrics print, log and warn of: that comes with the real evaluation."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
