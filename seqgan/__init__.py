"""SeQ-GAN: rethinking the objectives of vector-quantized tokenizers for image synthesis (Gu et al., CVPR 2024).

    from seqgan import ARSampler, ar_base, conv_tokenizer

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from core.exports import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "models": (
            "Tokenizer conv_tokenizer vqgan_tokenizer second_phase ConvEncoder ConvDecoder VQGANEncoder VQGANDecoder "
            "RegionalDilatedAttention VectorQuantizer EMAQuantizer FactorizedQuantizer RestartQuantizer "
            "quantizer_of_kind UsageEntropy MaskGITEntropy PatchDiscriminator StyleDiscriminator ARTransformer "
            "ar_base ar_large MaskedTransformer nar_base nar_large mask_ratio training_mask"
        ),
        "sampling": "ARSampler ParallelSampler",
        "generation": "Generator",
        "inference": "SampleRequest tokenizer_of",
        "codes": "CodeCache",
        "diagnostics": "codebook_usage code_histogram teacher_forced predicted_images",
        "data": "FFHQ LSUN TokenizerTransform ShapeDigits ShapeGlyphs",
        "standin": "ShapeReport TwoDecoderTransformer small_tokenizer small_transformer shape_perceptual",
        "trainer": "TokenizerTrainer TransformerTrainer",
        "perceptual": "SemanticPerceptualLoss LPIPS vgg16 classifier",
        "losses": "adaptive_weight autoregressive_loss discriminator_loss generator_loss gradient_penalty masked_loss",
        "metrics": "TokenizerQuality CodePredictability SampleQuality",
        "fidelity": "frechet_distance",
    },
)
