"""Readings of edits that need no other model, averaged over clips and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.evaluator import BaseMetric

from core.config.registry import METRICS


@METRICS.register_module()
class PlainScores(BaseMetric):
    """`change`, `flicker` and, for inverted starts, `inversion_psnr`; see
    `tune_a_video.inference.editing.plain_scores`.

    They say whether an evaluation has worked at all, not whether an edit is good: `change` near 0 is a copy of the
    source, an `inversion_psnr` below some 20 dB an inversion that does not lead back, and `flicker` is to be held
    against the source's own, `source_flicker`.
    """

    default_prefix = ""

    def process(self, data_batch: Any, data_samples: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Takes what `TuneAVideoTrainer.predict` returned."""
        batches = [data_samples] if isinstance(data_samples, Mapping) else data_samples
        self.results += [scores for batch in batches for scores in batch["scores"]]

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Means over clips; `change` and `flicker` over all edits."""
        edits = [one for scores in results for one in scores["edits"]]
        columns = {name: [one[name] for one in edits] for name in ("change", "flicker")}
        for name in ("source_flicker", "inversion_psnr"):
            columns[name] = [scores[name] for scores in results if name in scores]
        return {name: sum(values) / len(values) for name, values in columns.items() if values}
