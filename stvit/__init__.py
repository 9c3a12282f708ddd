"""STViT: efficient vision transformers with semantic tokens (Chang et al., CVPR 2023).

    from stvit import SemanticTokenViT, stvit_deit_small

Names are loaded when they are first used: the networks alone need neither the engine nor data. The models are known to
timm (`timm.create_model("stvit_deit_small_patch16_224")`) and OpenMMLab (`type="vitrine.STViTRSwin"`).
"""

from __future__ import annotations

import importlib
from typing import Any

from stvit.registration import register_models

# Exported name -> module that defines it.
_EXPORTS = {
    "SemanticTokenViT": "stvit.models",
    "SmallSemanticTokenViT": "stvit.models.small",
    "SemanticTokenGenerator": "stvit.models",
    "WindowTokenGenerator": "stvit.models",
    "TokenRecovery": "stvit.models",
    "WindowTokenRecovery": "stvit.models",
    "SwinTransformer": "stvit.models",
    "STViTSwin": "stvit.models",
    "STViTRSwin": "stvit.models",
    "stvit_deit_tiny": "stvit.models",
    "stvit_deit_small": "stvit.models",
    "stvit_deit_base": "stvit.models",
    "stvit_swin_tiny": "stvit.models",
    "stvit_swin_small": "stvit.models",
    "stvit_swin_base": "stvit.models",
    "stvit_r_swin_tiny": "stvit.models",
    "stvit_r_swin_small": "stvit.models",
    "stvit_r_swin_base": "stvit.models",
    "classification_loss": "stvit.losses",
    "label_smoothing_cross_entropy": "stvit.losses",
    "soft_target_cross_entropy": "stvit.losses",
    "ClassificationTrainer": "stvit.trainer",
    "Digits": "stvit.data",
    "GlyphField": "stvit.data",
    "DistillationTrainer": "stvit.distillation",
    "sparsify": "stvit.token_reduction",
    "VideoSwin": "stvit.models.video_swin",
    "STViTVideoSwin": "stvit.models.stvit_video",
    "ClipTokenGenerator": "stvit.models.clip_tokens",
    "VideoClassificationTrainer": "stvit.video",
    "MovingGlyphs": "stvit.moving_glyphs",
    "ClipTrainTransform": "stvit.clips",
    "ClipEvalTransform": "stvit.clips",
    "ClipViews": "stvit.clips",
    "MultiViewVideos": "stvit.clips",
    "token_picture": "stvit.visualize",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'stvit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


register_models()
