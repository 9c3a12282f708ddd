"""Images of slots and walks, and training curves."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
