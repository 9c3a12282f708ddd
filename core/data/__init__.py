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
    cache, provenance                              what was derived from data, and from which

Names are loaded when they are first used, so importing this package costs nothing.
"""

import importlib
from typing import Any

_HOME = {
    "Batch": "batch",
    "Collate": "batch",
    "collate": "batch",
    "ResumableBatchSampler": "batching",
    "CorruptCacheError": "cache",
    "DerivedCache": "cache",
    "IncompleteCacheError": "cache",
    "StaleCacheError": "cache",
    "MissingDataError": "errors",
    "SampleError": "errors",
    "SampleFault": "errors",
    "data_root": "errors",
    "ImageFolder": "folder",
    "ImageZip": "image_zip",
    "load_image": "images",
    "to_pil": "images",
    "ImageNet": "imagenet",
    "Loader": "loader",
    "build_loader": "loader",
    "Mix": "mix",
    "PackedStrings": "packed",
    "DevicePrefetcher": "prefetch",
    "hash_file": "provenance",
    "hash_files": "provenance",
    "hash_state": "provenance",
    "Draw": "sampling",
    "EvalSampler": "sampling",
    "TrainSampler": "sampling",
    "SeededDataset": "seeded",
    "derive_seed": "seeds",
    "preserved_random_state": "seeds",
    "seed_sample": "seeds",
    "TarShards": "tar",
    "EvalTransform": "transforms",
    "TrainTransform": "transforms",
    "to_device": "tree",
    "VideoError": "video",
    "VideoReader": "video",
    "read_frames": "video",
    "sample_indices": "video",
    "VideoList": "video_list",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
