"""Figures of whole sweeps: both means over VTAB-1k's tasks."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
