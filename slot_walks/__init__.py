"""Object-centric learning with cyclic walks between parts and whole (Wang et al., NeurIPS 2023).

    from slot_walks import DinoViT, SlotEncoder, SlotWalker, WalkLoss

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
