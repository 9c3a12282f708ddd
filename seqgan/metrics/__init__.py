"""Evaluators, distances between sets of images, and what codes are like."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
