"""Accuracy per group of samples: question types, data sets, manipulation methods."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.config.registry import METRICS
from core.errors import ConfigError
from core.metrics.predictions import MetricError, NanCount, OwnMetric, batches, check_counts, gather, read

Groups = tuple[str, ...]


@METRICS.register_module()
class GroupedAccuracy(OwnMetric):
    """Share of right answers in every group, over all samples (``micro``) and as mean of the groups (``macro``).

    A sample may belong to several groups and counts in each. A target outside the classes (-1, an answer that the
    vocabulary lacks) is a wrong answer and stays in the denominator.

    Args:
        group: key of the groups in the prediction or the batch: a name per sample, a list of names per sample, or an
            integer tensor (B,).
        prediction: key of scores (B, K), or of predicted classes (B,) integer.
        target: key of the right classes (B,) integer.
        top_k: an answer counts when it is among the k best (of K, where there are fewer).
        merge: old name -> new name of groups that are counted as one.
        aggregates: name -> shell patterns of groups; accuracy over all samples that belong to one of them.
        groups: the groups of ``macro``, each of which has to occur; None: all that occur.
        prefix: in front of all names (``prefix/name``).
        check_size: more samples than the data set has are an error.

    Raises:
        ConfigError: `top_k` below 1.
    """

    def __init__(
        self,
        group: str,
        prediction: str = "logits",
        target: str = "label",
        top_k: int = 1,
        merge: Mapping[str, str] | None = None,
        aggregates: Mapping[str, Sequence[str]] | None = None,
        groups: Sequence[str] | None = None,
        prefix: str = "",
        check_size: bool = True,
    ) -> None:
        super().__init__(prefix=prefix)
        if top_k < 1:
            raise ConfigError(f"core.metrics.GroupedAccuracy: top_k={top_k} is below 1")
        self.group, self.prediction, self.target, self.top_k = group, prediction, target, top_k
        self.merge = dict(merge or {})
        self.aggregates = {name: list(patterns) for name, patterns in (aggregates or {}).items()}
        self.groups = list(groups) if groups is not None else None
        self.check_size = check_size
        self._correct: list[Tensor] = []
        self._names: list[Groups] = []
        self._nans = NanCount()

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Takes one batch; the device is not read.

        Args:
            data_batch: the batch, for what the prediction does not repeat.
            data_samples: what ``trainer.predict`` returned.

        Raises:
            MetricError: a key is missing, or shapes and lengths do not fit.
        """
        for predicted in batches(data_samples):
            scores, target, groups = (
                read(key, predicted, data_batch) for key in (self.prediction, self.target, self.group)
            )
            names = [self._merged(g) for g in (groups.tolist() if isinstance(groups, Tensor) else groups)]
            correct = self._hits(scores, target)
            if len(names) != len(correct):
                raise MetricError(f"'{self.group}' names {len(names)} samples, '{self.target}' has {len(correct)}")
            self._nans.add(scores)
            self._correct.append(correct)
            self._names.extend(names)

    def _merged(self, groups: Any) -> Groups:
        listed = groups if isinstance(groups, list | tuple | set) else [groups]
        return tuple(dict.fromkeys(self.merge.get(str(g), str(g)) for g in listed))

    def _hits(self, scores: Tensor, target: Tensor) -> Tensor:
        """(B,) bool."""
        if target.ndim != 1 or len(scores) != len(target):
            shapes = f"'{self.prediction}' is {tuple(scores.shape)}, '{self.target}' is {tuple(target.shape)}"
            raise MetricError(f"{shapes}: (B, K) scores and (B,) classes are expected")
        if scores.ndim == 1 and not scores.is_floating_point() and self.top_k == 1:
            return scores == target
        if scores.ndim != 2:
            raise MetricError(
                f"'{self.prediction}' is {tuple(scores.shape)} {scores.dtype}: scores (B, K) are expected"
            )
        best = scores.topk(min(self.top_k, scores.shape[1]), dim=1).indices
        return (best == target[:, None]).any(dim=1)

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        """The figures over all processes; everything is reset. Collective.

        Args:
            size: samples in the data set; None: unknown.

        Raises:
            MetricError: nothing was evaluated, samples were counted twice, predictions hold NaN, or a group of `groups`
                or `aggregates` has no sample.
        """
        seen: Counter[Groups] = Counter(self._names)
        right: Counter[Groups] = Counter()
        hits = torch.cat([c.cpu() for c in self._correct]).tolist() if self._correct else []
        right.update(names for names, hit in zip(self._names, hits, strict=True) if hit)
        parts = gather((dict(seen), dict(right), self._nans.take()))
        self._correct, self._names = [], []
        seen, right = (sum((Counter(part[i]) for part in parts), Counter()) for i in (0, 1))
        check_counts("grouped accuracy", seen.total(), sum(part[2] for part in parts), size, self.check_size)
        names = self.groups if self.groups is not None else sorted({g for names in seen for g in names})
        accuracy = {name: _accuracy(seen, right, {name}, name) for name in names}
        known = {g for names in seen for g in names}
        for name, patterns in self.aggregates.items():
            members = {g for g in known if any(fnmatch.fnmatchcase(g, p) for p in patterns)}
            accuracy[name] = _accuracy(seen, right, members, name)
        figures = {
            "micro": right.total() / seen.total(),
            "macro": sum(accuracy[name] for name in names) / max(len(names), 1),
            **accuracy,
        }
        return self.prefixed(figures)


def _accuracy(seen: Mapping[Groups, int], right: Mapping[Groups, int], members: Iterable[str], name: str) -> float:
    members = set(members)
    count = sum(n for groups, n in seen.items() if members & set(groups))
    if count == 0:
        known = sorted({g for groups in seen for g in groups})
        raise MetricError(f"grouped accuracy: no sample belongs to '{name}' (there are {', '.join(known)})")
    return sum(n for groups, n in right.items() if members & set(groups)) / count
