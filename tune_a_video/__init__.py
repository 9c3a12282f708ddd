"""Tune-A-Video: one-shot tuning of image diffusion models for text-to-video generation (Wu et al., ICCV 2023).

    from tune_a_video import TuneAVideoPipeline, TuneAVideoUNet

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
