"""Public names, one import each: the package loads them from here when they are first used."""

from .ema import EMA as EMA
from .ema import AveragedNetwork as AveragedNetwork
from .fsdp import shard as shard
from .groups import OptimConstructor as OptimConstructor
from .groups import parameter_groups as parameter_groups
from .schedules import Schedule as Schedule
from .wrapper import OptimWrapper as OptimWrapper
from .wrapper import OptimWrapperDict as OptimWrapperDict
from .wrapper import autocast as autocast
