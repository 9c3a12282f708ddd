"""Public names, one import each: the package loads them from here when they are first used."""

from .evaluators import CodeBits as CodeBits
from .evaluators import CodebookUse as CodebookUse
from .evaluators import CodePredictability as CodePredictability
from .evaluators import ImageScores as ImageScores
from .evaluators import LinearProbe as LinearProbe
from .evaluators import SampleQuality as SampleQuality
from .evaluators import TokenizerQuality as TokenizerQuality
from .evaluators import as_bytes as as_bytes
