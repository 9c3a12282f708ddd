"""A tokenizer: encoder, quantiser, decoder; and how the second phase's tokenizer comes from the first's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.layers.precision import no_autocast
from seqgan.models.checks import check_codes
from seqgan.models.codebooks import quantizer_of_kind
from seqgan.models.conv_vqgan import MULTIPLIERS, ConvDecoder, ConvEncoder
from seqgan.models.quantizer import VectorQuantizer
from seqgan.models.taming_vqgan import VQGANDecoder, VQGANEncoder


class TokenizerOutput(NamedTuple):
    """What a tokenizer gives.

    reconstruction: `(B, 3, H, W)`, values not limited.
    indices: `(B, h, w)`.
    losses: the quantiser's weighted terms by name.
    """

    reconstruction: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class Tokenizer(nn.Module):
    """Images to a map of codes and back.

    Args:
        encoder: images `(B, 3, H, W)` to features.
        quantizer: features to codes.
        decoder: features to images.
        quant_conv: between encoder and quantiser, as VQGAN has it; None: nothing.
        post_quant_conv: between quantiser and decoder; None: nothing.
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: VectorQuantizer,
        decoder: nn.Module,
        quant_conv: nn.Module | None = None,
        post_quant_conv: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.quant_conv = nn.Identity() if quant_conv is None else quant_conv
        self.post_quant_conv = nn.Identity() if post_quant_conv is None else post_quant_conv
        self.codes_frozen = False

    def forward(self, image: Tensor) -> TokenizerOutput:
        """Reconstruct images `(B, 3, H, W)` in [-1, 1]."""
        z_q, indices, losses = self.quantizer(self.features(image))
        return TokenizerOutput(self.decoder(self.post_quant_conv(z_q)), indices, losses)

    def features(self, image: Tensor) -> Tensor:
        """What is quantised, `(B, C, h, w)`, of images `(B, 3, H, W)` in any precision, in that of the weights.

        Raises:
            ValueError: images that are no floats, or do not fit the encoder.
        """
        if not image.is_floating_point():
            raise ValueError(f"images are {str(image.dtype).removeprefix('torch.')}: give floats in [-1, 1]")
        weight = next(self.encoder.parameters(), image)
        return self.quant_conv(self.encoder(image.to(weight.dtype)))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Codes `(B, h, w)` of images, in the weights' precision also under autocast, since rounding moves ties."""
        with no_autocast(image):
            return self.quantizer.nearest(self.features(image).permute(0, 2, 3, 1))

    def decode(self, indices: Tensor) -> Tensor:
        """Images of codes `(B, h, w)`, or of sequences `(B, N)` of a square map in raster order.

        Raises:
            ValueError: a sequence that makes no square, or codes that the codebook does not have.
        """
        check_codes(indices, self.quantizer.size, dims=(2, 3))
        if indices.ndim == 2:
            side = math.isqrt(indices.shape[1])
            if side * side != indices.shape[1]:
                raise ValueError(f"{indices.shape[1]} codes make no square: give them as (B, h, w)")
            indices = indices.unflatten(1, (side, side))
        return self.decoder(self.post_quant_conv(self.quantizer.lookup(indices)))

    def fingerprint(self) -> str:
        """SHA-256 of what decides the codes: encoder, `quant_conv` and codebook. The decoder is free to change."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.", "quantizer.")):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def freeze_codes(self) -> Tokenizer:
        """Freeze what decides the codes for good (second phase, section 3.4); the decoder stays trainable."""
        for part in (self.encoder, self.quant_conv, self.quantizer):
            part.requires_grad_(False)
        self.codes_frozen = True
        return self.train(self.training)

    def requires_grad_(self, requires_grad: bool = True) -> Tokenizer:
        """As of any module; the quantiser is told, since some move codes without gradients."""
        super().requires_grad_(requires_grad)
        self.quantizer.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> Tokenizer:
        """Training mode, except for what `freeze_codes` has frozen: dropout would change codes, too."""
        super().train(mode)
        if self.codes_frozen:
            for part in (self.encoder, self.quant_conv, self.quantizer):
                part.eval()
        return self


def conv_tokenizer(
    filters: int = 128,
    multipliers: Sequence[int] = MULTIPLIERS,
    num_res_blocks: int = 2,
    codebook_size: int = 1024,
    z_dim: int = 256,
    shortcut: str = "official_output",
    extra: str = "none",
    beta: float = 0.25,
    entropy: nn.Module | None = None,
    window: int = 8,
    head_dim: int = 64,
    quantizer: str = "vq",
    quantizer_options: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The paper's tokenizer: 54.5M parameters in the first phase, 57.9M with `extra='attn1'` (table 3).

    Arguments as in `ConvEncoder`, `ConvDecoder` and `VectorQuantizer`; `quantizer` is the kind, see
    `seqgan.models.quantizer_of_kind`, and `quantizer_options` are further arguments of it.
    """
    options = {"entropy": entropy, **(quantizer_options or {})}
    return Tokenizer(
        ConvEncoder(filters, multipliers, num_res_blocks, z_dim, shortcut),
        quantizer_of_kind(quantizer, codebook_size, z_dim, beta, **options),
        ConvDecoder(filters, multipliers, num_res_blocks, z_dim, shortcut, extra, window, head_dim),
    )


def vqgan_tokenizer(
    ch: int = 128,
    ch_mult: Sequence[int] = MULTIPLIERS,
    num_res_blocks: int = 2,
    attn_resolutions: Sequence[int] = (16,),
    resolution: int = 256,
    z_channels: int = 256,
    codebook_size: int = 1024,
    embed_dim: int = 256,
    beta: float = 0.25,
    *,
    legacy_beta: bool = False,
    entropy: nn.Module | None = None,
    dropout: float = 0.0,
    in_channels: int = 3,
    out_ch: int = 3,
    resamp_with_conv: bool = True,
    double_z: bool = False,
) -> Tokenizer:
    """VQGAN's tokenizer (72.1M parameters), for published checkpoints and comparison.

    Arguments as in `VQGANEncoder`, `VQGANDecoder` and `VectorQuantizer`.
    """
    sizes = (ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels)
    common = {"resamp_with_conv": resamp_with_conv, "dropout": dropout}
    quantizer = VectorQuantizer(codebook_size, embed_dim, beta, legacy_beta=legacy_beta, entropy=entropy, init="taming")
    return Tokenizer(
        VQGANEncoder(*sizes, in_channels, double_z=double_z, **common),
        quantizer,
        VQGANDecoder(*sizes, out_ch, **common),
        nn.Conv2d((1 + double_z) * z_channels, embed_dim, 1),
        nn.Conv2d(embed_dim, z_channels, 1),
    )


def second_phase(tokenizer: Tokenizer, extra: str = "attn1") -> Tokenizer:
    """The second phase's tokenizer: the same encoder and codebook, frozen, and an enhanced decoder.

    The decoder starts from the first phase's weights. Its attention starts as the identity, so that it gives the same
    images at first. Encoder and quantiser are shared with `tokenizer`, not copied, and so are frozen in both.

    Args:
        tokenizer: of the first phase, with a `ConvDecoder`.
        extra: what is added, see `ConvDecoder`.

    Raises:
        ValueError: a decoder of another kind, one that is enhanced already, or an `extra` that adds nothing that
            starts as the identity.
    """
    decoder = tokenizer.decoder
    if not isinstance(decoder, ConvDecoder) or decoder.arguments["extra"] != "none":
        raise ValueError("the second phase starts from a ConvDecoder with extra='none'")
    if not extra.startswith("attn"):
        raise ValueError(f"extra={extra!r} does not start from the first phase's images: use attn1 or attn2")
    weight = decoder.conv_out.weight
    enhanced = ConvDecoder(**{**decoder.arguments, "extra": extra}).to(weight.device, weight.dtype)
    enhanced.load_state_dict({**enhanced.state_dict(), **decoder.state_dict()})
    tokenizer.freeze_codes()
    return Tokenizer(tokenizer.encoder, tokenizer.quantizer, enhanced).freeze_codes()
