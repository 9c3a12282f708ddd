"""Clips to tune on and to edit: one file, a folder of clips, DAVIS, LOVEU-TGVE-2023, and drawn ones.

    frames        which frames of a file, folder or array, and at what size
    one_shot      the data set of one clip
    clip_folder   folders of clips, DAVIS
    tgve          the benchmark's table and frames, and the layout of submissions

Names are loaded when they are first used.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
