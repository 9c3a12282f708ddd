"""Tune-A-Video: one-shot tuning of image diffusion models for text-to-video generation (Wu et al., ICCV 2023).

    from tune_a_video import TuneAVideoPipeline, TuneAVideoUNet

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from core.exports import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "models": (
            "TuneAVideoUNet TemporalConfig TemporalTransformerBlock SpatioTemporalAttnProcessor FrameGroupNorm inflate"
        ),
        "inversion": "ddim_invert",
        "lora": "merge_lora",
        "pipeline": "TuneAVideoPipeline TuneAVideoPipelineOutput",
        "video_io": "save_video video_grid",
        "editing": "Sampling edit",
        "prompts": "DrawnEdits",
        "trainer": "TuneAVideoTrainer",
        "plain_scores": "PlainScores",
        "page": "ResultsPage write_page",
        "data": "OneShotVideoDataset ClipFolder DAVIS DrawnClip LoveuTGVE Submission",
        "submission": "SubmissionFiles",
        "metrics": "ClipScores DrawnScores EditQuality FrameAccuracy FrameConsistency PickScore TextAlignment",
        "warp": "WarpError",
        "losses": "denoising_loss frame_noise",
    },
)
