"""Networks of STViT as plain modules: nothing here knows the engine, configs or data."""

from stvit.models.attention import Attention
from stvit.models.block import Block
from stvit.models.controls import AllTokens, PooledTokens, RandomTokens
from stvit.models.lvvit import LVViT, lvvit_medium, lvvit_small, stvit_lvvit_medium, stvit_lvvit_small
from stvit.models.merging import PatchMerging
from stvit.models.pooling import AdaptivePool, WeightedPool, build_pool
from stvit.models.recovery import TokenRecovery, WindowTokenRecovery
from stvit.models.stem import ConvStem, HalfConvStem, PatchStem
from stvit.models.stvit_r_swin import STViTRSwin, stvit_r_swin_base, stvit_r_swin_small, stvit_r_swin_tiny
from stvit.models.stvit_swin import STViTSwin, stvit_swin_base, stvit_swin_small, stvit_swin_tiny
from stvit.models.swin import SwinTransformer
from stvit.models.swin_block import SwinBlock
from stvit.models.tokens import SemanticTokenGenerator
from stvit.models.vit import SemanticTokenViT, stvit_deit_base, stvit_deit_small, stvit_deit_tiny
from stvit.models.window_tokens import WindowTokenGenerator

__all__ = [
    "AdaptivePool",
    "AllTokens",
    "Attention",
    "Block",
    "ConvStem",
    "HalfConvStem",
    "LVViT",
    "PatchMerging",
    "PatchStem",
    "PooledTokens",
    "RandomTokens",
    "STViTRSwin",
    "STViTSwin",
    "SemanticTokenGenerator",
    "SemanticTokenViT",
    "SwinBlock",
    "SwinTransformer",
    "TokenRecovery",
    "WeightedPool",
    "WindowTokenGenerator",
    "WindowTokenRecovery",
    "build_pool",
    "lvvit_medium",
    "lvvit_small",
    "stvit_deit_base",
    "stvit_deit_small",
    "stvit_deit_tiny",
    "stvit_lvvit_medium",
    "stvit_lvvit_small",
    "stvit_r_swin_base",
    "stvit_r_swin_small",
    "stvit_r_swin_tiny",
    "stvit_swin_base",
    "stvit_swin_small",
    "stvit_swin_tiny",
]
