"""Sampling, completion, images and pages."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
