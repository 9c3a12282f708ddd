"""Configs: Hydra composition, registries, checks of names and kinds, and when two configs mean the same run."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
