"""Readers of the data sets in the formats they are published in, and the stand-in. ImageNet is read by `core.data`."""

from seqgan.data.ffhq import FFHQ
from seqgan.data.lmdb import LMDBError, LMDBReader
from seqgan.data.lsun import LSUN
from seqgan.data.shape_digits import ShapeDigits
from seqgan.data.shape_glyphs import ShapeGlyphs
from seqgan.data.transforms import TokenizerTransform

__all__ = ["FFHQ", "LSUN", "LMDBError", "LMDBReader", "ShapeDigits", "ShapeGlyphs", "TokenizerTransform"]
