"""STViT-R on a plain ViT: dumbbell units without windows, for dense prediction (section 3.4 of the STViT paper).

image -> stem + position -> units -> map of all tokens
unit: layers on image tokens, token generation, layers on semantic tokens, recovery of the image tokens
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import Mlp, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_

from core.layers.recorded import fixed
from stvit.models.block import block_stack
from stvit.models.controls import PooledTokens
from stvit.models.derived import constant
from stvit.models.recovery import TokenRecovery
from stvit.models.segmentation import resize
from stvit.models.stem import build_stem
from stvit.models.tokens import SemanticTokenGenerator

TOKENS = ("semantic", "pooled", "all")


class UpsampleRecovery(nn.Module):
    """The control of `TokenRecovery`: tokens are enlarged to the raster and added, without any attention.

    `X <- X + up(S)`; `X <- X + MLP(LN X)`.

    Args:
        dim: channels C.
        mlp_ratio: hidden width of the MLP in units of C.
        norm_eps: epsilon of the norm.
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU)

    def forward(self, x: Tensor, tokens: Tensor, hw: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Raster tokens `(B, H*W, C)` with those of `grid`, `(B, S, C)`, to `(B, H*W, C)`."""
        coarse = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])
        x = x + rearrange(resize(coarse, hw), "b c h w -> b (h w) c")
        return x + self.mlp(self.norm(x))


class RecoveryUnit(nn.Module):
    """Layers on image tokens, reduction, layers on the few tokens, recovery.

    Args:
        base: layers on image tokens.
        reducer: raster tokens to few: `SemanticTokenGenerator` or `PooledTokens`.
        semantic: layers on the few.
        recovery: `TokenRecovery` or `UpsampleRecovery`.
    """

    def __init__(self, base: nn.ModuleList, reducer: nn.Module, semantic: nn.ModuleList, recovery: nn.Module) -> None:
        super().__init__()
        self.base, self.reducer, self.semantic, self.recovery = base, reducer, semantic, recovery

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Raster tokens `(B, H*W, C)` to as many."""
        for layer in self.base:
            x = layer(x)
        tokens = self.reducer(x, hw)
        for layer in self.semantic:
            tokens = layer(tokens)
        if isinstance(self.recovery, UpsampleRecovery):
            return self.recovery(x, tokens, hw, self.reducer.pool.grid)
        return self.recovery(x, tokens)


class PlainUnit(nn.Module):
    """As many layers, all of them on image tokens.

    Args:
        layers: of the unit.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Raster tokens `(B, H*W, C)` to as many."""
        for layer in self.layers:
            x = layer(x)
        return x


class RecoveryViT(nn.Module):
    """ViT whose units go through a few semantic tokens and give every image token back.

    Args:
        img_size: height and width in pixels (or one number for both) that positions are made for; others are accepted.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        embed_dim: channels C.
        num_heads: attention heads.
        units: number of units.
        base_depth: layers on image tokens of a unit.
        stgm_depth: generation layers of a unit.
        semantic_depth: layers on semantic tokens of a unit.
        token_grid: `(height, width)` of the semantic tokens, or one number for a square.
        tokens: `semantic`; `pooled` (as many pooled tokens, enlarged again: no attention between image tokens and the
            few); `all` (layers on image tokens only).
        pool: initial centres, see `SemanticTokenGenerator`.
        use_global: learned global centres in the first unit.
        shortcut: residual of the first generation layer.
        mlp_ratio: hidden width of the MLPs in units of C.
        qkv_bias: bias in query, key and value projections.
        layer_scale: initial value of per-channel scales of residual branches; None for none.
        stem: `patch` or `conv`.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        norm_eps: epsilon of layer norms.
        init: `paper`: linear layers and positions of deviation .02; `fan_in`: `fan_in ** -0.5` and .5, for few channels
            and short training (see `SmallSemanticTokenViT`).

    Raises:
        ValueError: unknown option.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        num_heads: int = 6,
        *,
        units: int = 2,
        base_depth: int = 1,
        stgm_depth: int = 2,
        semantic_depth: int = 2,
        token_grid: int | tuple[int, int] = 4,
        tokens: str = "semantic",
        pool: str = "weighted_offset",
        use_global: bool = True,
        shortcut: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        stem: str = "patch",
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        init: str = "paper",
    ) -> None:
        super().__init__()
        if tokens not in TOKENS:
            raise ValueError(f"unknown tokens {tokens!r}: use one of {', '.join(TOKENS)}")
        if init not in ("paper", "fan_in"):
            raise ValueError(f"unknown init {init!r}: use 'paper' or 'fan_in'")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.num_features = embed_dim
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module="units")]
        self.stem = build_stem(stem, patch_size, in_chans, embed_dim)
        self.grid = self.stem.grid(height, width)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], embed_dim))
        per_unit = base_depth + stgm_depth + semantic_depth + 1
        total = units * per_unit
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        block = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, layer_scale=layer_scale, norm_eps=norm_eps)
        built: list[nn.Module] = []
        for index in range(units):
            own = rates[index * per_unit : (index + 1) * per_unit]
            if tokens == "all":
                built.append(PlainUnit(block_stack(embed_dim, num_heads, own, **block)))
                continue
            generated = own[base_depth : base_depth + stgm_depth]
            centres = dict(grid=token_grid, depth=stgm_depth, pool=pool, drop_path=generated)
            if tokens == "semantic":
                reducer = SemanticTokenGenerator(
                    embed_dim, num_heads, **centres, use_global=use_global and index == 0, shortcut=shortcut, **block
                )
                recovery = TokenRecovery(embed_dim, num_heads, drop_path=own[-1], **block)
            else:
                reducer = PooledTokens(embed_dim, num_heads, **centres, **block)
                recovery = UpsampleRecovery(embed_dim, mlp_ratio=mlp_ratio, norm_eps=norm_eps)
            built.append(
                RecoveryUnit(
                    block_stack(embed_dim, num_heads, own[:base_depth], **block),
                    reducer,
                    block_stack(embed_dim, num_heads, own[base_depth + stgm_depth : -1], **block),
                    recovery,
                )
            )
        self.units = nn.ModuleList(built)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self._init(init)

    def _init(self, init: str) -> None:
        paper = init == "paper"
        _draw(self.pos_embed, 0.02 if paper else 0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _draw(module.weight, 0.02 if paper else module.in_features**-0.5)
                if module.bias is not None:
                    zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Images `(B, in_chans, H, W)` to one map `(B, C, H', W')`, in a tuple as other backbones give it."""
        x = self.stem(images)
        hw = fixed(x, 2, 3)
        position = (
            self.pos_embed
            if hw == self.grid
            else constant(
                lambda: resample_abs_pos_embed(self.pos_embed, list(hw), list(self.grid), num_prefix_tokens=0)
            )
        )
        x = rearrange(x, "b c h w -> b (h w) c") + position
        for unit in self.units:
            x = unit(x, hw)
        return (rearrange(self.norm(x), "b (h w) c -> b c h w", h=hw[0]).contiguous(),)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that are not decayed."""
        return {"pos_embed"}


@torch.no_grad()
def _draw(parameter: Tensor, std: float) -> None:
    trunc_normal_(parameter, std=std, a=-max(2.0, 2 * std), b=max(2.0, 2 * std))
