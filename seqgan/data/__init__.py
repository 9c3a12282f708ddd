"""Readers of the data sets in the formats they are published in. ImageNet is read by `core.data`."""

from seqgan.data.ffhq import FFHQ
from seqgan.data.lmdb import LMDBError, LMDBReader
from seqgan.data.lsun import LSUN
from seqgan.data.transforms import TokenizerTransform

__all__ = ["FFHQ", "LSUN", "LMDBError", "LMDBReader", "TokenizerTransform"]
