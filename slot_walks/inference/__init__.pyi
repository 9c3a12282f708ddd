"""Public names, one import each: the package loads them from here when they are first used."""

from .files import Walks as Walks
from .files import choose_patch as choose_patch
from .files import infer_picture as infer_picture
from .files import scenes_picture as scenes_picture
from .files import upsampled as upsampled
from .files import winners as winners
