"""Two-stage parameter-efficient transfer (Zhao et al., 2023) and the methods that its tables compare.

    from petl import TTC, LNTune, channel_scores, inject

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
