"""Public names, one import each: the package loads them from here when they are first used."""

from .scores import ClipScores as ClipScores
from .scores import DrawnScores as DrawnScores
from .scores import EditQuality as EditQuality
from .scores import FrameAccuracy as FrameAccuracy
from .scores import FrameConsistency as FrameConsistency
from .scores import PickScore as PickScore
from .scores import TextAlignment as TextAlignment
from .scores import consecutive_consistency as consecutive_consistency
from .scores import directional_similarity as directional_similarity
from .scores import frame_accuracy as frame_accuracy
from .scores import frame_consistency as frame_consistency
from .scores import text_alignment as text_alignment
