"""Networks of STViT as plain modules: nothing here knows the engine, configs or data."""

from stvit.models.attention import Attention
from stvit.models.block import Block
from stvit.models.controls import AllTokens, PooledTokens, RandomTokens
from stvit.models.merging import PatchMerging
from stvit.models.pooling import AdaptivePool, WeightedPool, build_pool
from stvit.models.recovery import TokenRecovery, WindowTokenRecovery
from stvit.models.stem import ConvStem, PatchStem
from stvit.models.tokens import SemanticTokenGenerator, WindowTokenGenerator
from stvit.models.vit import SemanticTokenViT, stvit_deit_base, stvit_deit_small, stvit_deit_tiny

__all__ = [
    "AdaptivePool",
    "AllTokens",
    "Attention",
    "Block",
    "ConvStem",
    "PatchMerging",
    "PatchStem",
    "PooledTokens",
    "RandomTokens",
    "SemanticTokenGenerator",
    "SemanticTokenViT",
    "TokenRecovery",
    "WeightedPool",
    "WindowTokenGenerator",
    "WindowTokenRecovery",
    "build_pool",
    "stvit_deit_base",
    "stvit_deit_small",
    "stvit_deit_tiny",
]
