"""Public names, one import each: the package loads them from here when they are first used."""

from .grouping import ForegroundExtraction as ForegroundExtraction
from .grouping import ObjectDiscovery as ObjectDiscovery
from .semantic import SemanticSegmentation as SemanticSegmentation
