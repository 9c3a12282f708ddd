"""Object-centric learning with cyclic walks between parts and whole (Wang et al., NeurIPS 2023).

    from slot_walks import DinoViT, SlotEncoder, SlotWalker, WalkLoss

Names are loaded when they are first used: the networks alone need neither the engine nor data.
"""

from core.exports import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "models": (
            "SlotWalker SlotEncoder SlotAttention SlotInit DinoViT TimmBackbone FilterBank MLPDecoder "
            "BroadcastDecoder TransformerDecoder dino_vits8 dino_vits16 dino_vitb8 dino_vitb16 position_table"
        ),
        "losses": "WalkLoss reconstruction_loss",
        "targets": "affinity_target",
        "walks": "transitions masks segments region_vectors",
        "diagnostics": "slot_usage usage_entropy effective_slots area_histogram pair_shares affinity_gap token_labels",
        "draws": "sample_noise",
        "trainer": "SlotTrainer",
        "cache": "FeatureCache",
        "clustering": "PatchClusters",
        "data": "Birds Dogs Cars Flowers VOC COCO MOVi COCOStuff Blobworld WholePicture",
        "metrics": "ForegroundExtraction ObjectDiscovery",
        "semantic": "SemanticSegmentation",
    },
)
