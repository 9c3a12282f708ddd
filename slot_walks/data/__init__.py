"""Data sets of the three tasks, in the formats that users have on disk.

    birds, dogs_cars, flowers    foreground extraction
    voc, coco, movi              object discovery (voc also semantic segmentation)
    cocostuff                    semantic segmentation
    transforms                   crops, sizes and value ranges
    feature_cache                what the frozen backbone makes of images, kept on disk
    prepare                      commands that bring files into these layouts

Names are loaded when they are first used.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
