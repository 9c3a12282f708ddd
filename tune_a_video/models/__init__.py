"""Networks of Tune-A-Video as diffusers models: nothing here knows the engine, configs or data."""

from tune_a_video.models.frame_attention import SpatioTemporalAttnProcessor, key_frames
from tune_a_video.models.frames import FrameCount, fold, unfold
from tune_a_video.models.group_norm import FrameGroupNorm
from tune_a_video.models.inflation import inflate
from tune_a_video.models.temporal import FrameAxisAttnProcessor, TemporalConfig, TemporalTransformerBlock
from tune_a_video.models.unet import TRAINABLE_MODULES, TuneAVideoUNet

__all__ = [
    "TRAINABLE_MODULES",
    "FrameAxisAttnProcessor",
    "FrameCount",
    "FrameGroupNorm",
    "SpatioTemporalAttnProcessor",
    "TemporalConfig",
    "TemporalTransformerBlock",
    "TuneAVideoUNet",
    "fold",
    "inflate",
    "key_frames",
    "unfold",
]
