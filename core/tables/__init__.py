"""Tables of a paper with our figures beside its own, claims with verdicts, ablations, and the stored runs."""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
