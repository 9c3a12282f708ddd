"""Public names, one import each: the package loads them from here when they are first used."""

from .clip_folder import DAVIS as DAVIS
from .clip_folder import ClipFolder as ClipFolder
from .clip_folder import read_captions as read_captions
from .frames import FrameSource as FrameSource
from .frames import clip_indices as clip_indices
from .frames import fit as fit
from .frames import open_frames as open_frames
from .one_shot import DrawnClip as DrawnClip
from .one_shot import OneShotVideoDataset as OneShotVideoDataset
from .tgve import LoveuTGVE as LoveuTGVE
from .tgve import Submission as Submission
from .tgve import TGVEClip as TGVEClip
from .tgve import read_table as read_table
