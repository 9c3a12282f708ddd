"""All figures of the stand-in: codes, reconstructions and samples, by judges that nothing was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from core.config.registry import DATASETS, METRICS, build
from core.metrics.predictions import batches
from seqgan.metrics.diagnostics import code_histogram, codebook_usage
from seqgan.standin.judges import ROOT, TemplateJudge, frechet, pooled_pixels, trained_network
from seqgan.standin.shape_glyphs import ShapeGlyphs

_KEPT = (
    "image", "label", "asked", "nll", "right", "mask", "codes", "codes2",
    "reconstruction1", "reconstruction2", "sample1", "sample2",
)  # fmt: skip


@METRICS.register_module()
class ShapeReport(BaseMetric):
    """What the stand-in's table has, for both phases' decoders on the same sequences.

    `bits` and `top1` per code, teacher-forced; `usage`, `perplexity`, `unigram_bits`; `codes_identical` (1 or 0); for
    p = 1, 2: `l1_p`, `psnr_p`, `rfid_p`, `class_accuracy_p` of reconstructions, and `consistency_p` (judge network),
    `template_p` (judge without a network), `gfid_p`, `pixel_fid_p` of samples.

    Args:
        data: training images (or their config), which the judge was trained with.
        codebook_size: number of codes.
        root: see `seqgan.standin.trained_network`.
    """

    default_prefix = ""

    def __init__(self, data: ShapeGlyphs | Mapping[str, Any], codebook_size: int = 64, root: str = ROOT) -> None:
        super().__init__()
        self.data = build(data, DATASETS) if isinstance(data, Mapping) else data
        self.codebook_size, self.root = codebook_size, root

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Keeps a batch, sample by sample."""
        for predicted in batches(data_samples):
            columns = [predicted[key].cpu() for key in _KEPT]
            self.results += [dict(zip(_KEPT, row, strict=True)) for row in zip(*columns, strict=True)]

    @torch.no_grad()
    def compute_metrics(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """All figures."""
        every = {key: torch.stack([row[key] for row in results]) for key in _KEPT}
        judge, template = (
            trained_network("judge", self.data, self.root),
            TemplateJudge(*self.data.templates(), self.data.local_contrast),
        )
        image, label, asked = every["image"], every["label"], every["asked"]
        use = codebook_usage(code_histogram(every["codes"], self.codebook_size))
        found = {
            "bits": float(every["nll"][every["mask"]].double().mean() / math.log(2)),
            "top1": float(every["right"][every["mask"]].double().mean()),
            "usage": float(use.usage),
            "perplexity": float(use.perplexity),
            "unigram_bits": math.log2(float(use.perplexity)),
            "codes_identical": float(torch.equal(every["codes"], every["codes2"])),
        }
        real, pixels = judge.features(image), pooled_pixels(image)
        for phase in (1, 2):
            made, sample = every[f"reconstruction{phase}"], every[f"sample{phase}"]
            error = ((made - image) / 2).square().mean(dim=(1, 2, 3))
            found |= {
                f"l1_{phase}": float((made - image).abs().mean()),
                f"psnr_{phase}": float((-10 * error.clamp_min(1e-12).log10()).mean()),
                f"rfid_{phase}": frechet(real, judge.features(made)),
                f"class_accuracy_{phase}": _share(judge(made)[:, :10].argmax(1), label),
                f"consistency_{phase}": _share(judge(sample)[:, :10].argmax(1), asked),
                f"template_{phase}": _share(template(sample), asked),
                f"gfid_{phase}": frechet(real, judge.features(sample)),
                f"pixel_fid_{phase}": frechet(pixels, pooled_pixels(sample)),
            }
        return found


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).double().mean())
