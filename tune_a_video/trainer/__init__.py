"""What one step of one-shot tuning is, and prior preservation."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
