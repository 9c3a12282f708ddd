"""What one step is: of slots, and of clusters that learn nothing."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
