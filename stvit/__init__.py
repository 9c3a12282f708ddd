"""STViT: efficient vision transformers with semantic tokens (Chang et al., CVPR 2023).

    from stvit import SemanticTokenViT, stvit_deit_small

Names are loaded when they are first used: the networks alone need neither the engine nor data. The models are known to
timm (`timm.create_model("stvit_deit_small_patch16_224")`) and OpenMMLab (`type="vitrine.STViTRSwin"`).
"""

from core.config.packages import lazy
from stvit.interop.registration import register_models

__getattr__, __dir__, __all__ = lazy(__name__, __file__)

register_models()
