"""The frozen backbone: DINO's ViT, whose patch features are the parts that walks lead over.

Parameters have the names of DINO's files and of timm's `vit_small_patch8_224.dino`, so that either loads as it is.
"""

from __future__ import annotations

from functools import partial
from os import PathLike

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from core.layers.recorded import constant, fixed
from slot_walks.models.positions import resize_positions
from slot_walks.models.weights import read_backbone

FACETS = ("token", "query", "key", "value")


class DinoViT(nn.Module):
    """A plain ViT with class token that gives patch features; it is never trained (section 3 of the paper).

    Args:
        img_size: side of the square pictures that the position table was learned on.
        patch_size: side of a patch.
        embed_dim: channels C.
        depth: layers.
        num_heads: heads of a layer.
        mlp_ratio: width of the MLPs over C.
        qkv_bias: whether queries, keys and values have a bias.
        norm_eps: of the layer norms.
        final_norm: whether features pass the last layer norm. The authors' released checkpoints were trained with it,
            their current code is without.
        layer: the layer whose output is taken, counted from 1; None: the last. Later ones are not run.
        facet: `token`: the layer's output; `query`, `key`, `value`: these of its attention, heads side by side.
        weights: a DINO or timm checkpoint to load; None: as initialised.

    Raises:
        ValueError: an unknown facet, a layer that does not exist, or a final norm of a query, key or value.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 8,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        final_norm: bool = False,
        layer: int | None = None,
        facet: str = "token",
        weights: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.layer = check_choice(depth, layer, facet, final_norm)
        self.patch_size, self.dim = patch_size, embed_dim
        self.final_norm, self.facet = final_norm, facet
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self._positions: dict[tuple[object, ...], Tensor] = {}
        if weights is not None:
            read_backbone(self, weights)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """`(h, w)` of patches of pictures `(B, 3, H, W)`; a rest that fills no patch is not seen."""
        height, width = fixed(image, -2, -1)
        return height // self.patch_size, width // self.patch_size

    def forward(self, image: Tensor) -> Tensor:
        """Features `(B, h*w, C)` in row-major order of pictures `(B, 3, H, W)` of any size and shape."""
        if self.facet == "token":
            return self.tokens(image)[:, 1:]
        block = self.blocks[self.layer - 1]
        qkv = block.attn.qkv(block.norm1(self._through(self.embed(image), self.layer - 1)))
        return qkv[:, 1:].chunk(3, dim=-1)[FACETS.index(self.facet) - 1]

    def tokens(self, image: Tensor) -> Tensor:
        """All tokens after the layer taken, class token first: `(B, 1 + h*w, C)`."""
        tokens = self._through(self.embed(image), self.layer)
        return self.norm(tokens) if self.final_norm else tokens

    def embed(self, image: Tensor) -> Tensor:
        """Patches and class token with their positions, `(B, 1 + h*w, C)`."""
        patches = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(image.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        return tokens + self.positions(self.grid(image)).to(tokens.dtype)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table on a grid, `(1, 1 + h*w, C)`; made once per grid while the table stays as it is."""
        table = self.pos_embed
        if torch.jit.is_tracing():
            return constant(partial(resize_positions, table, grid))
        learns = torch.is_grad_enabled() and table.requires_grad
        if learns or torch.compiler.is_compiling() or type(table) is not nn.Parameter or table.is_meta:
            return resize_positions(table, grid)
        # Loading weights raises the version; moving to another device or type changes the address.
        state = (table.data_ptr(), table._version, table.dtype, table.device, torch.is_inference_mode_enabled())
        if (grid, state) not in self._positions:
            self._positions = {key: value for key, value in self._positions.items() if key[1] == state}
            self._positions[grid, state] = resize_positions(table.detach(), grid)
        return self._positions[grid, state]

    def _through(self, tokens: Tensor, layers: int) -> Tensor:
        for block in self.blocks[:layers]:
            tokens = block(tokens)
        return tokens


def check_choice(depth: int, layer: int | None, facet: str, final_norm: bool) -> int:
    """The number of the layer that is taken, counted from 1.

    Raises:
        ValueError: see `DinoViT`.
    """
    if facet not in FACETS:
        raise ValueError(f"unknown facet {facet!r}: use {', '.join(FACETS)}")
    if facet != "token" and final_norm:
        raise ValueError(f"final_norm belongs to tokens, not to a layer's {facet}: set it to false")
    layer = depth if layer is None else layer
    if not 1 <= layer <= depth:
        raise ValueError(f"layer={layer}: the backbone has layers 1 to {depth}")
    return layer


def dino_vits8(**options: object) -> DinoViT:
    """DINO's ViT-S/8, the paper's backbone: 21.67 M parameters."""
    return DinoViT(patch_size=8, embed_dim=384, num_heads=6, **options)


def dino_vits16(**options: object) -> DinoViT:
    """DINO's ViT-S/16."""
    return DinoViT(patch_size=16, embed_dim=384, num_heads=6, **options)


def dino_vitb8(**options: object) -> DinoViT:
    """DINO's ViT-B/8."""
    return DinoViT(patch_size=8, embed_dim=768, num_heads=12, **options)


def dino_vitb16(**options: object) -> DinoViT:
    """DINO's ViT-B/16."""
    return DinoViT(patch_size=16, embed_dim=768, num_heads=12, **options)
