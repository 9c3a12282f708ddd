"""Public names, one import each: the package loads them from here when they are first used."""

from .targets import affinity_target as affinity_target
from .walk_loss import WalkLoss as WalkLoss
from .walk_loss import reconstruction_loss as reconstruction_loss
from .walks import masks as masks
from .walks import region_vectors as region_vectors
from .walks import segments as segments
from .walks import transitions as transitions
