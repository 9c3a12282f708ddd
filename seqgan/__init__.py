"""SeQ-GAN: rethinking the objectives of vector-quantized tokenizers for image synthesis (Gu et al., CVPR 2024).

    from seqgan import ARSampler, ar_base, conv_tokenizer

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from __future__ import annotations

import importlib
from typing import Any

# Exported name -> module that defines it.
_EXPORTS = {
    "Tokenizer": "seqgan.models",
    "conv_tokenizer": "seqgan.models",
    "vqgan_tokenizer": "seqgan.models",
    "second_phase": "seqgan.models",
    "ConvEncoder": "seqgan.models",
    "ConvDecoder": "seqgan.models",
    "VQGANEncoder": "seqgan.models",
    "VQGANDecoder": "seqgan.models",
    "RegionalDilatedAttention": "seqgan.models",
    "VectorQuantizer": "seqgan.models",
    "EMAQuantizer": "seqgan.models",
    "FactorizedQuantizer": "seqgan.models",
    "RestartQuantizer": "seqgan.models",
    "quantizer_of_kind": "seqgan.models",
    "UsageEntropy": "seqgan.models",
    "MaskGITEntropy": "seqgan.models",
    "PatchDiscriminator": "seqgan.models",
    "StyleDiscriminator": "seqgan.models",
    "ARTransformer": "seqgan.models",
    "ar_base": "seqgan.models",
    "ar_large": "seqgan.models",
    "MaskedTransformer": "seqgan.models",
    "nar_base": "seqgan.models",
    "nar_large": "seqgan.models",
    "mask_ratio": "seqgan.models",
    "training_mask": "seqgan.models",
    "ARSampler": "seqgan.sampling",
    "ParallelSampler": "seqgan.sampling",
    "Generator": "seqgan.generation",
    "SampleRequest": "seqgan.inference",
    "tokenizer_of": "seqgan.inference",
    "CodeCache": "seqgan.codes",
    "codebook_usage": "seqgan.diagnostics",
    "code_histogram": "seqgan.diagnostics",
    "teacher_forced": "seqgan.diagnostics",
    "predicted_images": "seqgan.diagnostics",
    "FFHQ": "seqgan.data",
    "LSUN": "seqgan.data",
    "TokenizerTransform": "seqgan.data",
    "ShapeDigits": "seqgan.data",
    "ShapeGlyphs": "seqgan.data",
    "ShapeReport": "seqgan.standin",
    "TwoDecoderTransformer": "seqgan.standin",
    "small_tokenizer": "seqgan.standin",
    "small_transformer": "seqgan.standin",
    "shape_perceptual": "seqgan.standin",
    "TokenizerTrainer": "seqgan.trainer",
    "TransformerTrainer": "seqgan.trainer",
    "SemanticPerceptualLoss": "seqgan.perceptual",
    "LPIPS": "seqgan.perceptual",
    "vgg16": "seqgan.perceptual",
    "classifier": "seqgan.perceptual",
    "adaptive_weight": "seqgan.losses",
    "autoregressive_loss": "seqgan.losses",
    "discriminator_loss": "seqgan.losses",
    "generator_loss": "seqgan.losses",
    "gradient_penalty": "seqgan.losses",
    "masked_loss": "seqgan.losses",
    "TokenizerQuality": "seqgan.metrics",
    "CodePredictability": "seqgan.metrics",
    "SampleQuality": "seqgan.metrics",
    "frechet_distance": "seqgan.fidelity",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'seqgan' has no attribute '{name}'")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
