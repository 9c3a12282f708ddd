"""torchmetrics as mmengine metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from core.config.registry import METRICS, build
from core.errors import ConfigError, nearest
from core.layers.precision import full_precision
from core.metrics.predictions import (
    MetricError,
    NanCount,
    OwnMetric,
    batches,
    check_counts,
    collective_device,
    count_samples,
    gather,
    read,
)

_ACTIVATIONS = {"softmax": lambda scores: scores.softmax(dim=1), "sigmoid": torch.sigmoid}


@METRICS.register_module()
class TorchMetrics(OwnMetric):
    """Any metrics of torchmetrics, over what ``trainer.predict`` returns.

    Whole batches are updated on their device. Several processes may hold shares of any size, none included: states are
    put together by torchmetrics' own synchronisation, every sample counts once.

    .. code-block:: yaml

        val_evaluator:
          type: core.metrics.TorchMetrics
          metrics:
            top1: {type: torchmetrics.classification.MulticlassAccuracy, num_classes: 10, average: micro}
            auc: {type: torchmetrics.classification.BinaryAUROC}
          inputs: {auc: [fake_score, is_fake]}

    A metric that gives several figures is spread out: a vector as ``name/0``, ``name/1``, ..., a dictionary as
    ``name/key``.

    Args:
        metrics: name -> torchmetrics metric (or its config); None leaves out the one of that name.
        prediction: key of the first argument of ``update`` in the prediction (or the batch).
        target: key of the second; None: there is none.
        inputs: name -> keys of all its arguments, for metrics that read others than `prediction` and `target`.
        activations: name -> ``softmax`` (over axis 1) or ``sigmoid``, applied to its first argument. Metrics of scores
            (AUROC, average precision, calibration) want it for logits: by themselves they judge from the values of each
            batch whether it holds logits or probabilities, so that small batches may be judged differently.
        names: makes the figures of a metric that gives several stand under their own names, without the metric's in
            front; ``metric/figure`` -> name for those that are to be called otherwise. A deviation, ``figure_std``, is
            called as its figure is.
        prefix: in front of all names (``prefix/name``).
        check_size: more samples than the data set has are an error.
        allow_nan: a figure that is NaN is passed on instead of being an error.

    Raises:
        ConfigError: no metrics, `inputs` or `activations` of a metric that does not exist, another activation.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric | MetricCollection | Mapping[str, Any] | None],
        prediction: str = "logits",
        target: str | None = "label",
        inputs: Mapping[str, Sequence[str]] | None = None,
        activations: Mapping[str, Literal["softmax", "sigmoid"]] | None = None,
        names: Mapping[str, str] | None = None,
        prefix: str = "",
        check_size: bool = True,
        allow_nan: bool = False,
    ) -> None:
        super().__init__(prefix=prefix)
        self.measures = {name: _built(name, metric) for name, metric in metrics.items() if metric is not None}
        if not self.measures:
            raise ConfigError("core.metrics.TorchMetrics: give at least one metric, as name: {type: torchmetrics....}")
        pair = [key for key in (prediction, target) if key is not None]
        self.inputs = {name: list((inputs or {}).get(name, pair)) for name in self.measures}
        self.activations = dict(activations or {})
        for name in [*(inputs or {}), *self.activations]:
            if name not in metrics:
                raise ConfigError(f"core.metrics.TorchMetrics: there is no metric '{name}'{nearest(name, metrics)}")
        for name, activation in self.activations.items():
            if activation not in _ACTIVATIONS:
                raise ConfigError(f"core.metrics.TorchMetrics: activations.{name}={activation}: softmax or sigmoid")
        self.names = names
        self.check_size, self.allow_nan = check_size, allow_nan
        self._seen = 0
        self._nans = NanCount()

    @property
    def metrics(self) -> list[OwnMetric]:
        """This metric: mmengine takes a single config that has a key ``metrics`` for an evaluator's."""
        return [self]

    def may_report(self, figure: str) -> bool:
        """Whether some samples may give a figure of this name, as ``accuracy/3``, one of a vector over the classes."""
        if self.names is not None or type(self).evaluate is not TorchMetrics.evaluate:  # it may give them other names
            return True
        name = figure.removeprefix(f"{self.prefix}/") if self.prefix else figure
        for measure, metric in self.measures.items():
            if name.startswith(f"{measure}/") and (name != figure or not self.prefix):
                classes = (
                    getattr(metric, "num_classes", None) if getattr(metric, "average", "") in (None, "none") else None
                )
                index = name.removeprefix(f"{measure}/")
                return classes is None or (index.isdecimal() and int(index) < classes)
        return False

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Takes one batch.

        Args:
            data_batch: the batch, for inputs that the prediction does not repeat.
            data_samples: what ``trainer.predict`` returned: a dictionary of tensors (B, ...).

        Raises:
            MetricError: an input is missing, or does not suit the metric.
        """
        for predicted in batches(data_samples):
            checked: set[str] = set()
            for name, metric in self.measures.items():
                keys = self.inputs[name]
                values = [read(key, predicted, data_batch) for key in keys]
                # In float32, so that softmax and thresholds do not round half-precision predictions a second time.
                values = [full_precision(v) if isinstance(v, torch.Tensor) else v for v in values]
                if not checked:
                    self._seen += count_samples(values, predicted)
                for key, value in zip(keys, values, strict=True):
                    if key not in checked:
                        self._nans.add(value)
                        checked.add(key)
                if name in self.activations:
                    values[0] = _ACTIVATIONS[self.activations[name]](values[0])
                device = next((v.device for v in values if isinstance(v, torch.Tensor)), None)
                if device is not None:
                    metric.to(device)
                self._update(name, metric, values)

    @staticmethod
    def _update(name: str, metric: Metric | MetricCollection, values: list[Any]) -> None:
        # Some metrics of torchmetrics take views, which channels_last and transposed tensors refuse.
        values = [v.contiguous() if isinstance(v, torch.Tensor) else v for v in values]
        try:
            metric.update(*values)
        except (ValueError, RuntimeError, TypeError) as error:
            shapes = ", ".join(f"{tuple(v.shape)} {v.dtype}" if isinstance(v, torch.Tensor) else str(v) for v in values)
            if any(isinstance(v, torch.Tensor) and v.is_floating_point() and v.isnan().any() for v in values):
                raise MetricError(f"metric '{name}': the predictions hold NaN") from error
            raise MetricError(f"metric '{name}' does not take ({shapes}): {error}") from error

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        """The figures over all processes; everything is reset. Collective.

        Args:
            size: samples in the data set; None: unknown.

        Raises:
            MetricError: nothing was evaluated, samples were counted twice, or something is NaN.
        """
        try:
            facts = gather({"seen": self._seen, "nans": self._nans.take(), "states": self._list_states()})
            seen, nans = (sum(part[key] for part in facts) for key in ("seen", "nans"))
            check_counts("evaluation", seen, nans, size, self.check_size)
            self._fill_empty_states([part["states"] for part in facts])
            figures: dict[str, float] = {}
            for name, metric in self.measures.items():
                with warnings.catch_warnings():  # a process without samples has not updated, and need not have
                    warnings.filterwarnings("ignore", "The ``compute`` method of metric")
                    figures.update({self._name(key): value for key, value in _spread(name, metric.compute()).items()})
        finally:
            self._seen = 0
            self._nans.take()
            for metric in self.measures.values():
                metric.reset()
        bad = [name for name, value in figures.items() if math.isnan(value)]
        if bad and not self.allow_nan:
            raise MetricError(
                f"{', '.join(bad)} came out as NaN: a class or group without samples, or too few of them "
                "(allow_nan=true passes it on)"
            )
        return self.prefixed(figures)

    def _name(self, key: str) -> str:
        metric, _, figure = key.partition("/")
        if self.names is None or not figure:
            return key
        plain = figure.removesuffix("_std")
        return self.names.get(f"{metric}/{plain}", plain) + figure[len(plain) :]

    def _each(self) -> Iterator[tuple[str, Metric]]:
        for name, metric in self.measures.items():
            if isinstance(metric, MetricCollection):
                yield from ((f"{name}/{inner}", m) for inner, m in metric.items(copy_state=False))
            else:
                yield name, metric

    def _list_states(self) -> dict[tuple[str, str], tuple[torch.dtype, torch.Size]]:
        """Element type and shape of what metrics have collected in lists, where they have collected something."""
        kinds = {}
        for name, metric in self._each():
            for state in metric._defaults:
                value = getattr(metric, state)
                if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                    first = torch.atleast_1d(value[0])
                    kinds[name, state] = (first.dtype, first.shape[1:])
        return kinds

    def _fill_empty_states(self, kinds: list[dict]) -> None:
        """Gives a process without samples empty tensors of the type that the others gather.

        torchmetrics would send a float vector, which neither fits integers nor more than one axis.
        """
        known = {key: kind for part in reversed(kinds) for key, kind in part.items()}
        device = collective_device()
        for name, metric in self._each():
            if device is not None:
                metric.to(device)
            for state, reduction in metric._reductions.items():
                kind = known.get((name, state))
                if reduction == dim_zero_cat and kind is not None and getattr(metric, state) == []:
                    empty = torch.empty((0, *kind[1]), dtype=kind[0], device=device or metric.device)
                    setattr(metric, state, [empty])


def _built(name: str, metric: Any) -> Metric | MetricCollection:
    built = build(metric)
    if not isinstance(built, Metric | MetricCollection):
        raise ConfigError(
            f"core.metrics.TorchMetrics: '{name}' is a {type(built).__name__}, not a torchmetrics metric "
            "({type: torchmetrics.classification.MulticlassAccuracy, num_classes: ...})"
        )
    return built


def _spread(name: str, value: Any) -> dict[str, float]:
    """A metric's result as named Python floats."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _spread(f"{name}/{key}", inner).items()}
    if isinstance(value, int | float):
        return {name: float(value)}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.numel() == 1:
            return {name: float(value)}
        if value.ndim == 1:
            return {f"{name}/{index}": number for index, number in enumerate(value.double().tolist())}
        raise MetricError(f"metric '{name}' gives {tuple(value.shape)} figures: choose one that gives numbers")
    raise MetricError(f"metric '{name}' gives a {type(value).__name__}: choose one that gives numbers")
