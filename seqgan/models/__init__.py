"""Networks of SeQ-GAN as plain modules: nothing here knows the engine, configs or data."""

from seqgan.models.attention import RegionalDilatedAttention, SpatialAttention
from seqgan.models.autoregressive import ARTransformer, KeyValueCache, ar_base, ar_large
from seqgan.models.codebooks import EMAQuantizer, FactorizedQuantizer, RestartQuantizer, quantizer_of_kind
from seqgan.models.conv_vqgan import ConvDecoder, ConvEncoder
from seqgan.models.discriminators import PatchDiscriminator, StyleDiscriminator
from seqgan.models.entropy import MaskGITEntropy, UsageEntropy, code_usage
from seqgan.models.masked import MaskedTransformer, nar_base, nar_large
from seqgan.models.masking import mask_ratio, training_mask
from seqgan.models.quantizer import Quantized, VectorQuantizer
from seqgan.models.resample import UpsampleConv
from seqgan.models.residual import ResidualBlock
from seqgan.models.taming_vqgan import VQGANDecoder, VQGANEncoder
from seqgan.models.tokenizer import Tokenizer, TokenizerOutput, conv_tokenizer, second_phase, vqgan_tokenizer

__all__ = [
    "ARTransformer",
    "ConvDecoder",
    "ConvEncoder",
    "EMAQuantizer",
    "FactorizedQuantizer",
    "KeyValueCache",
    "MaskGITEntropy",
    "MaskedTransformer",
    "PatchDiscriminator",
    "Quantized",
    "RegionalDilatedAttention",
    "ResidualBlock",
    "RestartQuantizer",
    "SpatialAttention",
    "StyleDiscriminator",
    "Tokenizer",
    "TokenizerOutput",
    "UpsampleConv",
    "UsageEntropy",
    "VQGANDecoder",
    "VQGANEncoder",
    "VectorQuantizer",
    "ar_base",
    "ar_large",
    "code_usage",
    "conv_tokenizer",
    "mask_ratio",
    "nar_base",
    "nar_large",
    "quantizer_of_kind",
    "second_phase",
    "training_mask",
    "vqgan_tokenizer",
]
