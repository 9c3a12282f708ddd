"""The engine: config, registries, launcher, data, metrics and tools. Nothing in it names a paper."""

from core.config import moved
from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)

moved.install()
