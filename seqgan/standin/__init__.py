"""The claim in miniature: small networks on ShapeGlyphs, judges, and the report of a run."""

from seqgan.standin.judges import TemplateJudge, frechet, prepare_networks, shape_perceptual, trained_network
from seqgan.standin.networks import (
    JudgeNetwork,
    LossNetwork,
    SmallDecoder,
    SmallEncoder,
    small_tokenizer,
    small_transformer,
)
from seqgan.standin.report import ShapeReport
from seqgan.standin.trainer import TwoDecoderTransformer

__all__ = [
    "JudgeNetwork",
    "LossNetwork",
    "ShapeReport",
    "SmallDecoder",
    "SmallEncoder",
    "TemplateJudge",
    "TwoDecoderTransformer",
    "frechet",
    "prepare_networks",
    "shape_perceptual",
    "small_tokenizer",
    "small_transformer",
    "trained_network",
]
