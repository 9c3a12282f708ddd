"""What one step is: of a classifier, with a teacher, of segmentation, of video."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
