"""Public names, one import each: the package loads them from here when they are first used."""

from .composition import CANNOT_COMPOSE as CANNOT_COMPOSE
from .composition import CONFIGS as CONFIGS
from .composition import compose as compose
from .composition import composer as composer
from .composition import experiments as experiments
from .composition import get as get
from .composition import merge as merge
from .composition import to_dict as to_dict
from .packages import lazy as lazy
from .registry import build as build
from .registry import resolve as resolve
