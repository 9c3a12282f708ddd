"""Pictures of what matters to a task, and of which channels tasks share."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
