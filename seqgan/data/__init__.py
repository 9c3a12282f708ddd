"""Readers of the data sets, and the stand-in."""

from seqgan.data.shape_glyphs import ShapeGlyphs

__all__ = ["ShapeGlyphs"]
