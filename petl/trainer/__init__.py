"""What one step of transfer is, how its network is built from a config, and the choice between the two stages."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
