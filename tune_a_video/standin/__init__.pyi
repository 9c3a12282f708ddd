"""Public names, one import each: the package loads them from here when they are first used."""

from .folder import load_judge as load_judge
from .folder import load_tiny_clip as load_tiny_clip
from .measures import Reading as Reading
from .measures import agreement as agreement
from .measures import jitter as jitter
from .measures import joint_frames as joint_frames
from .measures import measure as measure
from .measures import path_distances as path_distances
from .measures import right_words as right_words
from .networks import Judge as Judge
from .networks import PictureTower as PictureTower
from .networks import TinyCLIP as TinyCLIP
from .networks import make_tokenizer as make_tokenizer
from .training import make_scheduler as make_scheduler
from .training import make_unet as make_unet
from .vae import identity_vae as identity_vae
from .world import Clip as Clip
from .world import Edit as Edit
from .world import Words as Words
from .world import all_words as all_words
from .world import captions as captions
from .world import draw_clip as draw_clip
from .world import draw_pictures as draw_pictures
from .world import edits as edits
from .world import parse_caption as parse_caption
from .world import words_of_looks as words_of_looks
