"""Tune-A-Video: one-shot tuning of image diffusion models for text-to-video generation (Wu et al., ICCV 2023).

    from tune_a_video import TuneAVideoPipeline, TuneAVideoUNet

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from __future__ import annotations

import importlib
from typing import Any

# Exported name -> module that defines it.
_EXPORTS = {
    "TuneAVideoUNet": "tune_a_video.models",
    "TemporalConfig": "tune_a_video.models",
    "TemporalTransformerBlock": "tune_a_video.models",
    "SpatioTemporalAttnProcessor": "tune_a_video.models",
    "FrameGroupNorm": "tune_a_video.models",
    "inflate": "tune_a_video.models",
    "ddim_invert": "tune_a_video.inversion",
    "merge_lora": "tune_a_video.lora",
    "TuneAVideoPipeline": "tune_a_video.pipeline",
    "TuneAVideoPipelineOutput": "tune_a_video.pipeline",
    "save_video": "tune_a_video.video_io",
    "video_grid": "tune_a_video.video_io",
    "Sampling": "tune_a_video.editing",
    "edit": "tune_a_video.editing",
    "DrawnEdits": "tune_a_video.prompts",
    "TuneAVideoTrainer": "tune_a_video.trainer",
    "PlainScores": "tune_a_video.plain_scores",
    "ResultsPage": "tune_a_video.page",
    "write_page": "tune_a_video.page",
    "OneShotVideoDataset": "tune_a_video.data",
    "ClipFolder": "tune_a_video.data",
    "DAVIS": "tune_a_video.data",
    "DrawnClip": "tune_a_video.data",
    "LoveuTGVE": "tune_a_video.data",
    "Submission": "tune_a_video.data",
    "SubmissionFiles": "tune_a_video.submission",
    "ClipScores": "tune_a_video.metrics",
    "DrawnScores": "tune_a_video.metrics",
    "EditQuality": "tune_a_video.metrics",
    "FrameAccuracy": "tune_a_video.metrics",
    "FrameConsistency": "tune_a_video.metrics",
    "PickScore": "tune_a_video.metrics",
    "TextAlignment": "tune_a_video.metrics",
    "WarpError": "tune_a_video.warp",
    "denoising_loss": "tune_a_video.losses",
    "frame_noise": "tune_a_video.losses",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tune_a_video' has no attribute '{name}'")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
