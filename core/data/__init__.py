"""The data layer: samplers, seeded samples, loaders, readers, transforms and caches.

The rule that everything here keeps: a sample's random decisions depend on (run seed, epoch, global position)
and on nothing else. Workers, ranks and interruptions change who does the work, never what comes out.

    sampling   who is drawn, in which order, with which seed
    batching   batches of draws, and resuming in the middle of an epoch
    seeded     a dataset whose samples are drawn under their seed; broken samples
    batch      a list of samples becomes a batch
    loader     a dataloader config becomes a loader
    prefetch   batches travel to the device during the step before
    folder, image_zip, tar, imagenet, video_list   readers of what is on disk
    video, images, transforms, mix                 decoding, augmentation, mixing
    derived, cache, provenance                     what was derived from data, how it is stored, and from which

Names are loaded when they are first used, so importing this package costs nothing.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
