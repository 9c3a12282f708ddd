"""Figures of whole sweeps: means over VTAB-1k's tasks; accuracy over some of ImageNet's classes."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
