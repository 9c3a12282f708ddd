"""What a model costs: parameters, multiply-accumulates, time in turn with others, memory."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
