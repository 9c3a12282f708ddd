"""STViT: efficient vision transformers with semantic tokens (Chang et al., CVPR 2023).

    from stvit import SemanticTokenViT, stvit_deit_small

Names are loaded when they are first used: the networks alone need neither the engine nor data. The models are known to
timm (`timm.create_model("stvit_deit_small_patch16_224")`) and OpenMMLab (`type="vitrine.STViTRSwin"`).
"""

from core.exports import lazy
from stvit.registration import register_models

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "models": (
            "SemanticTokenViT SemanticTokenGenerator WindowTokenGenerator TokenRecovery WindowTokenRecovery "
            "SwinTransformer STViTSwin STViTRSwin stvit_deit_tiny stvit_deit_small stvit_deit_base stvit_swin_tiny "
            "stvit_swin_small stvit_swin_base stvit_r_swin_tiny stvit_r_swin_small stvit_r_swin_base"
        ),
        "models.small": "SmallSemanticTokenViT",
        "losses": "classification_loss label_smoothing_cross_entropy soft_target_cross_entropy",
        "trainer": "ClassificationTrainer",
        "data": "Digits GlyphField",
        "distillation": "DistillationTrainer",
        "token_reduction": "sparsify",
        "models.video_swin": "VideoSwin",
        "models.stvit_video": "STViTVideoSwin",
        "models.clip_tokens": "ClipTokenGenerator",
        "video": "VideoClassificationTrainer",
        "moving_glyphs": "MovingGlyphs",
        "clips": "ClipTrainTransform ClipEvalTransform ClipViews MultiViewVideos",
        "visualize": "token_picture",
    },
)

register_models()
