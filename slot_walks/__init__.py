"""Object-centric learning with cyclic walks between parts and whole (Wang et al., NeurIPS 2023).

    from slot_walks import DinoViT, SlotEncoder, SlotWalker, WalkLoss

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from __future__ import annotations

import importlib
from typing import Any

# Exported name -> module that defines it.
_EXPORTS = {
    "SlotWalker": "slot_walks.models",
    "SlotEncoder": "slot_walks.models",
    "SlotAttention": "slot_walks.models",
    "SlotInit": "slot_walks.models",
    "DinoViT": "slot_walks.models",
    "TimmBackbone": "slot_walks.models",
    "FilterBank": "slot_walks.models",
    "MLPDecoder": "slot_walks.models",
    "BroadcastDecoder": "slot_walks.models",
    "TransformerDecoder": "slot_walks.models",
    "dino_vits8": "slot_walks.models",
    "dino_vits16": "slot_walks.models",
    "dino_vitb8": "slot_walks.models",
    "dino_vitb16": "slot_walks.models",
    "position_table": "slot_walks.models",
    "WalkLoss": "slot_walks.losses",
    "reconstruction_loss": "slot_walks.losses",
    "affinity_target": "slot_walks.targets",
    "transitions": "slot_walks.walks",
    "masks": "slot_walks.walks",
    "segments": "slot_walks.walks",
    "region_vectors": "slot_walks.walks",
    "slot_usage": "slot_walks.diagnostics",
    "usage_entropy": "slot_walks.diagnostics",
    "effective_slots": "slot_walks.diagnostics",
    "area_histogram": "slot_walks.diagnostics",
    "pair_shares": "slot_walks.diagnostics",
    "affinity_gap": "slot_walks.diagnostics",
    "token_labels": "slot_walks.diagnostics",
    "sample_noise": "slot_walks.draws",
    "SlotTrainer": "slot_walks.trainer",
    "FeatureCache": "slot_walks.cache",
    "PatchClusters": "slot_walks.clustering",
    "Birds": "slot_walks.data",
    "Dogs": "slot_walks.data",
    "Cars": "slot_walks.data",
    "Flowers": "slot_walks.data",
    "VOC": "slot_walks.data",
    "COCO": "slot_walks.data",
    "MOVi": "slot_walks.data",
    "COCOStuff": "slot_walks.data",
    "Blobworld": "slot_walks.data",
    "WholePicture": "slot_walks.data",
    "ForegroundExtraction": "slot_walks.metrics",
    "ObjectDiscovery": "slot_walks.metrics",
    "SemanticSegmentation": "slot_walks.semantic",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'slot_walks' has no attribute '{name}'")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
