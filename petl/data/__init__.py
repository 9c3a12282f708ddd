"""Data sets of transfer learning, in the formats that users have on disk.

    vtab, fgvc, few_shot, domain    readers: 19 tasks of VTAB-1k, five of FGVC, five few-shot, ImageNet's variants
    listed                          what they share: lists of images, checks of sizes, reports, origin
    transforms                      sizes, augmentation, normalisation
    store                           the decoded training set, kept on disk
    originals, prepare              the sets as they were published, and commands that bring them into these layouts

Names are loaded when they are first used.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
