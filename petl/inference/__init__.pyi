"""Names of this folder, loaded when they are first used."""

from .importance import importance_page as importance_page
from .importance import overlap_page as overlap_page
