"""Data sets of the three tasks, in the formats that users have on disk, and scenes that are drawn instead.

    birds, dogs_cars, flowers    foreground extraction
    voc, coco, movi              object discovery (voc also semantic segmentation)
    cocostuff                    semantic segmentation
    standin                      drawn scenes, no download
    transforms                   crops, sizes and value ranges

Names are loaded when they are first used.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
