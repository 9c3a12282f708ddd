"""Decoders that reconstruct patch features from slots: the training signals that walks replace.

All take slots `(B, K, D)` and a grid, and give the reconstruction `(B, N, C)` with each slot's share of every patch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.layers.recorded import constant

KINDS = ("mlp", "broadcast", "transformer")


class Reconstruction(NamedTuple):
    """What a decoder gives.

    features: `(B, N, C)`.
    masks: `(B, K, N)`; they sum to one over the slots.
    """

    features: Tensor
    masks: Tensor


def build_decoder(
    kind: str,
    slot_dim: int,
    feature_dim: int,
    grid: int | tuple[int, int],
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
) -> nn.Module:
    """A decoder by name.

    Args:
        kind: `mlp`, `broadcast` or `transformer`.
        slot_dim: channels D of a slot.
        feature_dim: channels C of a feature.
        grid: `(h, w)` of the patches in training, or one number for a square; another grid can be decoded later.
        width: of hidden layers; None: the decoder's own default.
        depth: number of hidden layers; None: likewise.
        heads: of the transformer; None: likewise.

    Raises:
        ValueError: an unknown kind, or heads of a decoder that has none.
    """
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    options = {key: value for key, value in (("width", width), ("depth", depth)) if value is not None}
    if kind == "transformer":
        options |= {} if heads is None else {"heads": heads}
        return TransformerDecoder(slot_dim, feature_dim, grid, **options)
    if heads is not None:
        raise ValueError(f"decoder {kind!r} has no attention heads: leave heads out")
    if kind == "mlp":
        return MLPDecoder(slot_dim, feature_dim, grid, **options)
    if kind == "broadcast":
        return BroadcastDecoder(slot_dim, feature_dim, **options)
    raise ValueError(f"unknown decoder {kind!r}: use {', '.join(KINDS)}")


class MLPDecoder(nn.Module):
    """DINOSAUR's MLP decoder: a slot at a place becomes a feature and a logit of its share.

    Each slot is repeated over the patches, a learned position is added, an MLP gives C + 1 channels. The last one is
    the logit of a softmax over slots, with which the other channels are averaged.

    Args:
        slot_dim: channels D of a slot.
        feature_dim: channels C of a feature.
        grid: `(h, w)` that positions are learned on.
        width: of the hidden layers (DINOSAUR: 1024 for MOVi, 2048 for COCO).
        depth: number of hidden layers.
    """

    def __init__(
        self, slot_dim: int, feature_dim: int, grid: tuple[int, int], width: int = 1024, depth: int = 3
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], slot_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        widths = [slot_dim, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], feature_dim + 1))

    def forward(self, slots: Tensor, grid: tuple[int, int], features: Tensor | None = None) -> Reconstruction:
        """Features of slots `(B, K, D)` on a grid; `features` are not looked at."""
        placed = slots[:, :, None] + on_grid(self.pos_embed, self.grid, grid)[:, None]  # (B, K, N, D)
        return _mixed(self.layers(placed))


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder on the grid of patches: convolutions over a slot repeated everywhere, with positions.

    Positions are the four distances to the grid's borders through a linear layer (Slot Attention's), so any grid can be
    decoded. Features and shares as in `MLPDecoder`.

    Args:
        slot_dim: channels D of a slot.
        feature_dim: channels C of a feature.
        width: of the hidden layers.
        depth: number of hidden layers.
        kernel: side of the convolutions.
    """

    def __init__(self, slot_dim: int, feature_dim: int, width: int = 64, depth: int = 3, kernel: int = 5) -> None:
        super().__init__()
        self.position = nn.Linear(4, slot_dim)
        widths = [slot_dim, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], feature_dim + 1, 1))

    def forward(self, slots: Tensor, grid: tuple[int, int], features: Tensor | None = None) -> Reconstruction:
        """Features of slots `(B, K, D)` on a grid; `features` are not looked at."""
        height, width = grid
        down = torch.linspace(0, 1, height, device=slots.device, dtype=slots.dtype)[:, None].expand(height, width)
        along = torch.linspace(0, 1, width, device=slots.device, dtype=slots.dtype)[None].expand(height, width)
        places = self.position(torch.stack([down, along, 1 - down, 1 - along], dim=-1))  # (h, w, D)
        placed = slots[:, :, None, None] + places
        decoded = self.layers(rearrange(placed, "b k h w d -> (b k) d h w"))
        return _mixed(rearrange(decoded, "(b k) c h w -> b k (h w) c", b=slots.shape[0]))


class TransformerDecoder(nn.Module):
    """Autoregressive decoder (SLATE, DINOSAUR): each patch from those before it in raster order and from the slots.

    Teacher forced: all patches are decoded in one pass, each from the true features before it. Masks are the last
    layer's cross-attention over slots, averaged over its heads.

    Args:
        slot_dim: channels D of a slot.
        feature_dim: channels C of a feature.
        grid: `(h, w)` that positions are learned on.
        width: channels of the layers; None: C.
        depth: number of layers.
        heads: of self- and cross-attention.
        mlp_ratio: width of the MLPs over that of the layers.
    """

    def __init__(
        self,
        slot_dim: int,
        feature_dim: int,
        grid: tuple[int, int],
        width: int | None = None,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        width = feature_dim if width is None else width
        self.grid = tuple(grid)
        self.begin = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
        for table in (self.begin, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.read_features = nn.Linear(feature_dim, width)
        self.read_slots = nn.Linear(slot_dim, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, feature_dim)

    def forward(self, slots: Tensor, grid: tuple[int, int], features: Tensor | None = None) -> Reconstruction:
        """Features from slots `(B, K, D)` and the true `features` `(B, N, C)`, which get no gradient.

        Raises:
            ValueError: no features.
        """
        if features is None:
            raise ValueError("the transformer decoder is teacher forced: it needs the features that it reconstructs")
        before = self.read_features(features[:, :-1].detach())
        tokens = torch.cat([self.begin.expand(slots.shape[0], -1, -1).to(before.dtype), before], dim=1)
        tokens = tokens + on_grid(self.pos_embed, self.grid, grid)
        memory = self.read_slots(slots)
        for block in self.blocks[:-1]:
            tokens = block(tokens, memory)
        tokens, shares = self.blocks[-1].with_shares(tokens, memory)
        return Reconstruction(self.write(self.norm(tokens)), shares.transpose(1, 2))


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the slots and an MLP, each behind a layer norm.

    Args:
        width: channels W.
        heads: of both attentions.
        mlp_ratio: width of the MLP over W.

    Raises:
        ValueError: W is not divisible by the heads.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a decoder of {width} channels cannot be split into {heads} heads of equal size")
        self.heads = heads
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.join_self = nn.Linear(width, width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.join_cross = nn.Linear(width, width)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Tokens `(B, N, W)` after reading earlier ones and the slots `memory` `(B, K, W)`."""
        tokens = self._look_back(tokens)
        queries, keys, values = self._towards(tokens, memory)
        return self._finish(tokens, F.scaled_dot_product_attention(queries, keys, values))

    def with_shares(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the cross-attention averaged over heads, `(B, N, K)`."""
        tokens = self._look_back(tokens)
        queries, keys, values = self._towards(tokens, memory)
        shares = (queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5).softmax(dim=-1)
        return self._finish(tokens, shares.to(values.dtype) @ values), shares.mean(dim=1)

    def _look_back(self, tokens: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm_self(tokens)), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return tokens + self.join_self(rearrange(mixed, "b h n d -> b n (h d)"))

    def _towards(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries = rearrange(self.q(self.norm_cross(tokens)), "b n (h d) -> b h n d", h=self.heads)
        keys, values = rearrange(self.kv(memory), "b k (s h d) -> s b h k d", s=2, h=self.heads)
        return queries, keys, values

    def _finish(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        tokens = tokens + self.join_cross(rearrange(mixed, "b h n d -> b n (h d)"))
        return tokens + self.mlp(self.norm_mlp(tokens))


def on_grid(table: Tensor, learned: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Positions `(1, N, D)` learned on one grid, resampled bicubically to another."""
    if tuple(learned) == tuple(grid):
        return table

    def resampled() -> Tensor:
        maps = rearrange(table, "1 (h w) d -> 1 d h w", h=learned[0])
        maps = F.interpolate(maps, size=tuple(grid), mode="bicubic", align_corners=False)
        return rearrange(maps, "1 d h w -> 1 (h w) d")

    return constant(resampled)


def _mixed(decoded: Tensor) -> Reconstruction:
    """Features of every slot with a logit behind them, `(B, K, N, C + 1)`, mixed by the softmax of the logits."""
    shares = decoded[..., -1].softmax(dim=1)  # (B, K, N)
    return Reconstruction((decoded[..., :-1] * shares.unsqueeze(-1)).sum(dim=1), shares)
