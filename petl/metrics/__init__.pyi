"""Public names, one import each: the package loads them from here when they are first used."""

from .vtab import MixedOriginError as MixedOriginError
from .vtab import VTABSummary as VTABSummary
from .vtab import selected_by as selected_by
