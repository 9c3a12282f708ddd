"""A masked autoencoder (He et al., 2111.06377): a small ViT learns from images without labels.

The digit scenes get their learned features from it, see `slot_walks.standin.pretraining`. The encoder sees the patches
that are left over; a decoder of one block paints the pixels of those that were taken away.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from slot_walks.models.positions import position_table
from slot_walks.models.vit import DinoViT

# Mean and deviation of the pixels of drawn scenes, roughly.
_GREY, _DEVIATION = 0.5, 0.125


class MaskedAutoencoder(nn.Module):
    """Reconstruction of the pixels of masked patches from the others.

    Pixels are not normalised patch by patch: that would take away the colour of an even patch, and colour is what tells
    the objects of drawn scenes apart.

    Args:
        encoder: the ViT that learns; its last layer and final norm are trained, too.
        mask_ratio: share of the patches that are taken away, in (0, 1); 0.75 is that of photographs.
        num_heads: attention heads of the decoder's block, which is as wide as the encoder.

    Raises:
        ValueError: a share that leaves no patch, or masks none.
    """

    def __init__(self, encoder: DinoViT, mask_ratio: float = 0.6, num_heads: int = 4) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio={mask_ratio}: a share between 0 and 1")
        self.encoder, self.mask_ratio = encoder, mask_ratio
        width = encoder.dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros_like(encoder.pos_embed))
        self.embed = nn.Linear(width, width)
        self.block = Block(width, num_heads, qkv_bias=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * encoder.patch_size**2)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """The start of the published method where few steps have to do: sines as places, grey in and out.

        Pixels in [0, 1] enter as if they were standardised, and the first reconstruction is grey, so that no step is
        spent on the range of the pixels.
        """
        project = self.encoder.patch_embed["proj"]
        nn.init.xavier_uniform_(project.weight.flatten(1))
        project.weight.mul_(1 / _DEVIATION)
        project.bias.copy_(-_GREY * project.weight.flatten(1).sum(dim=1))
        nn.init.trunc_normal_(self.head.weight, std=0.02 * _DEVIATION)
        nn.init.constant_(self.head.bias, _GREY)
        side = round((self.places.shape[1] - 1) ** 0.5)
        sines = rearrange(position_table(self.encoder.dim, side, side), "c h w -> (h w) c")
        for table in (self.encoder.pos_embed, self.places):
            table[0, 0].zero_()
            table[0, 1:].copy_(sines)

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the masked patches' pixels, a scalar.

        Args:
            image: `(B, 3, H, W)`, of the size that the encoder's position table was made for.
            generator: of the masks; None: torch's own.

        Raises:
            ValueError: an image that is so small that no patch is left, or none is masked.
        """
        patches = rearrange(
            image, "b c (h p) (w q) -> b (h w) (p q c)", p=self.encoder.patch_size, q=self.encoder.patch_size
        )
        batch, count = patches.shape[:2]
        kept = round(count * (1 - self.mask_ratio))
        if not 0 < kept < count:
            raise ValueError(f"mask_ratio={self.mask_ratio} of {count} patches leaves {kept} and masks {count - kept}")
        order = torch.rand(batch, count, generator=generator, device=image.device).argsort(dim=1)
        seen, hidden = order[:, :kept], order[:, kept:]

        tokens = self.encoder.embed(image)
        first = torch.cat([tokens[:, :1], _take(tokens[:, 1:], seen)], dim=1)
        for block in self.encoder.blocks:
            first = block(first)
        first = self.embed(self.encoder.norm(first))

        painted = self.mask_token.expand(batch, count, -1)
        painted = painted.scatter(1, seen[..., None].expand(-1, -1, painted.shape[-1]), first[:, 1:])
        painted = torch.cat([first[:, :1], painted], dim=1) + self.places
        painted = self.head(self.norm(self.block(painted))[:, 1:])
        return (_take(painted, hidden) - _take(patches, hidden)).square().mean()


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    """The tokens `(B, n, C)` of the given rows `(B, n)`, of `(B, N, C)`."""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
