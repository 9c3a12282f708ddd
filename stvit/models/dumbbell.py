"""Layers of a stage that goes through semantic tokens (sections 3.3 and 3.4 of the STViT paper).

A unit is: Swin layers on image tokens, generation of semantic tokens, layers on semantic tokens, and (STViT-R) recovery
of the image tokens. With recovery units can be repeated: the dumbbell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor, nn

from stvit.models.block import Block
from stvit.models.derived import derived
from stvit.models.hierarchy import call, merge
from stvit.models.merging import PatchMerging
from stvit.models.recovery import WindowTokenRecovery
from stvit.models.swin_block import SwinBlock
from stvit.models.window_tokens import TokenGrid, WindowTokenGenerator, readable, readable_mask
from stvit.models.windows import crop_grid, split_windows

LOCAL_GLOBAL = ("alternate", "local", "global")
RECOVER = ("dumbbell", "reuse", "once", "none")


class SemanticLayers(nn.ModuleList):
    """Self-attention of semantic tokens, inside their window or among all.

    Args:
        dim: channels C.
        num_heads: attention heads.
        drop_path: stochastic depth, one rate per layer.
        per_window: semantic tokens per window side.
        local_global: `alternate` (first local, then global, ...), `local` or `global`.
        relative_grid: grid of all tokens that relative positions are learned for, in global layers (resampled for
            others); local layers learn those of their window. None: no relative positions.
        exact: whether tokens that stand for padding alone are masked.
        options: further arguments of every `Block`.

    Raises:
        ValueError: unknown pattern.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: Sequence[float],
        *,
        per_window: int = 3,
        local_global: str = "alternate",
        relative_grid: tuple[int, int] | None = None,
        exact: bool = True,
        **options: object,
    ) -> None:
        if local_global not in LOCAL_GLOBAL:
            raise ValueError(f"unknown local_global {local_global!r}: use one of {', '.join(LOCAL_GLOBAL)}")
        layers = []
        for i, rate in enumerate(drop_path):
            local = local_global == "local" or (local_global == "alternate" and i % 2 == 0)
            window = per_window if local else None
            relative = None if relative_grid is None else window or relative_grid
            layers.append(Block(dim, num_heads, window=window, relative_window=relative, drop_path=rate, **options))
        super().__init__(layers)
        self.exact = exact

    def forward(self, tokens: Tensor, where: TokenGrid) -> Tensor:
        """Semantic tokens `(B, S, C)` to as many."""
        everywhere = readable(tokens, where) if self.exact else None
        inside = None
        if everywhere is not None:
            inside = derived(_readable_in_windows, tokens, where)
            inside = repeat(inside, "w n -> (b w) 1 1 n", b=tokens.shape[0])
        for layer in self:
            tokens = layer(tokens, grid=where.size, mask=everywhere if layer.window is None else inside)
        return tokens


def _readable_in_windows(where: TokenGrid, *, device: torch.device) -> Tensor:
    """Boolean `(windows, n)`: which semantic tokens may be attended."""
    return split_windows(readable_mask(where, 0, device=device)[..., None], where.size, where.per_window).squeeze(-1)


class SemanticUnit(nn.Module):
    """Swin layers, token generation, layers on tokens, and recovery.

    Args:
        base: layers on image tokens, called with the raster.
        generator: makes semantic tokens.
        semantic: layers on semantic tokens.
        recovery: gives image tokens back what semantic tokens learned; None: image tokens stay as the base layers
            leave them.
    """

    def __init__(
        self,
        base: Sequence[SwinBlock],
        generator: WindowTokenGenerator,
        semantic: SemanticLayers,
        recovery: WindowTokenRecovery | None = None,
    ) -> None:
        super().__init__()
        self.base = nn.ModuleList(base)
        self.generator = generator
        self.semantic = semantic
        self.recovery = recovery

    def forward(self, x: Tensor, hw: tuple[int, int], tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image tokens `(B, H*W, C)` with `hw = (H, W)` to image tokens and semantic tokens `(B, S, C)`.

        `tokens` `(B, S, C)`: semantic tokens that are updated instead of fresh ones.
        """
        for block in self.base:
            x = block(x, hw)
        tokens = self.semantic(self.generator(x, hw, tokens), self.generator.tokens_of(hw))
        return (x if self.recovery is None else self.recovery(x, hw, tokens)), tokens


class SemanticStage(nn.Module):
    """Patch merging and units; what comes out are image tokens, or without recovery the semantic tokens.

    Args:
        downsample: patch merging, or None.
        units: see `SemanticUnit`; all but the last need recovery.
        reuse: whether later units go on with the semantic tokens of the first instead of making new ones.
    """

    def __init__(self, downsample: PatchMerging | None, units: Sequence[SemanticUnit], *, reuse: bool = False) -> None:
        super().__init__()
        self.downsample = downsample
        self.units = nn.ModuleList(units)
        self.reuse = reuse
        self.grad_checkpointing = False

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Raster tokens `(B, H*W, C')` with `hw = (H, W)` to those of the stage and their raster.

        Without recovery that raster is the grid of semantic tokens, less those that stand for padding alone.
        """
        x, hw = merge(self.downsample, x, hw)
        tokens = None
        for unit in self.units:
            x, tokens = call(unit, x, hw, tokens if self.reuse else None, recompute=self.grad_checkpointing)
        if self.units[-1].recovery is not None:
            return x, hw
        where = self.units[-1].generator.tokens_of(hw)
        return crop_grid(tokens, where.size, where.valid), where.valid

    def token_maps(self, x: Tensor, hw: tuple[int, int], unit: int = -1) -> Tensor:
        """What each semantic token of a unit is made of: `(B, S, H, W)`, see `WindowTokenGenerator.token_maps`.

        Raises:
            ValueError: a unit that only updates the tokens of another.
        """
        unit = unit % len(self.units)
        if self.reuse and unit:
            raise ValueError("with recover='reuse' tokens are made in unit 0 only")
        x, hw = merge(self.downsample, x, hw)
        for before in self.units[:unit]:
            x, _ = before(x, hw)
        for block in self.units[unit].base:
            x = block(x, hw)
        return self.units[unit].generator.token_maps(x, hw)


def unit_layout(
    depth: int, recover: str, *, base_depth: int = 1, stgm_depth: int = 2, semantic_depth: int = 2
) -> list[dict[str, int]]:
    """How many layers of each kind the units of a stage have: `base`, `stgm`, `semantic`, `recovery`.

    `dumbbell` and `reuse` repeat the unit until `depth` layers are used up. `once` has all base layers first, makes
    tokens once and recovers once, at the end; `none` likewise without recovery. Both have as many base layers as the
    repeated units would have.

    Raises:
        ValueError: unknown `recover`, or a depth that units do not add up to.
    """
    if recover not in RECOVER:
        raise ValueError(f"unknown recover {recover!r}: use one of {', '.join(RECOVER)}")
    unit = base_depth + stgm_depth + semantic_depth + 1
    if min(base_depth, semantic_depth) < 0 or stgm_depth < 1 or depth % unit or depth < unit:
        raise ValueError(
            f"{depth} layers are no multiple of the unit's {base_depth} Swin + {stgm_depth} generation + "
            f"{semantic_depth} semantic + 1 recovery layers: choose depths[2] as a multiple of {unit}, or other depths"
        )
    repeats = depth // unit
    if recover in ("dumbbell", "reuse"):
        return [dict(base=base_depth, stgm=stgm_depth, semantic=semantic_depth, recovery=1)] * repeats
    recovery = int(recover == "once")
    base = base_depth * repeats
    return [dict(base=base, stgm=stgm_depth, semantic=depth - base - stgm_depth - recovery, recovery=recovery)]
