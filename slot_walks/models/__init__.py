"""Networks of cyclic walks as plain modules: nothing here knows the engine, configs or data."""

from slot_walks.models.decoders import BroadcastDecoder, MLPDecoder, TransformerDecoder, build_decoder
from slot_walks.models.encoder import SlotEncoder, SlotOutput
from slot_walks.models.filterbank import FilterBank
from slot_walks.models.masked import MaskedAutoencoder
from slot_walks.models.positions import position_affinity, position_table, resize_positions
from slot_walks.models.slot_attention import SlotAttention, SlotAttentionOutput
from slot_walks.models.slot_init import SlotInit
from slot_walks.models.timm_backbone import TimmBackbone
from slot_walks.models.vit import DinoViT, dino_vitb8, dino_vitb16, dino_vits8, dino_vits16
from slot_walks.models.walker import SlotWalker, WalkerOutput

__all__ = [
    "BroadcastDecoder",
    "DinoViT",
    "FilterBank",
    "MLPDecoder",
    "MaskedAutoencoder",
    "SlotAttention",
    "SlotAttentionOutput",
    "SlotEncoder",
    "SlotInit",
    "SlotOutput",
    "SlotWalker",
    "TimmBackbone",
    "TransformerDecoder",
    "WalkerOutput",
    "build_decoder",
    "dino_vitb8",
    "dino_vitb16",
    "dino_vits8",
    "dino_vits16",
    "position_affinity",
    "position_table",
    "resize_positions",
]
