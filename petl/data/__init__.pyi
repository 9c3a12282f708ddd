"""Public names, one import each: the package loads them from here when they are first used."""

from .domain import DomainGeneralisation as DomainGeneralisation
from .features import PrefixFeatures as PrefixFeatures
from .few_shot import FewShot as FewShot
from .fgvc import FGVC as FGVC
from .packed import OfTask as OfTask
from .packed import SideBySide as SideBySide
from .store import DecodedStore as DecodedStore
from .transforms import TransferTransform as TransferTransform
from .vtab import GROUPS as GROUPS
from .vtab import TASKS as TASKS
from .vtab import VTAB1k as VTAB1k
