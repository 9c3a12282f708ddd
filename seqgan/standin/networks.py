"""Small networks of the stand-in: a tokenizer with 6 x 6 codes, its loss network, a judge, and transformers."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from seqgan.models import ARTransformer, MaskedTransformer, SpatialAttention, Tokenizer, VectorQuantizer
from seqgan.models.checks import check_image

OUTPUTS = 13  # ten classes, and centre and size of the shape


class LossNetwork(nn.Module):
    """The semantic network of the perceptual loss: five convolutions, one hidden layer; 121,373 parameters.

    Names of the activations that a loss can read are in `LOSS_TAPS`.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.relus = nn.ModuleList(nn.ReLU() for _ in self.convs)
        self.hidden = nn.Linear(576, 64)
        self.head = nn.Linear(64, OUTPUTS)

    def forward(self, image: Tensor) -> Tensor:
        """`(B, 13)` of images `(B, 3, 24, 24)` in [-1, 1]: ten logits, then the place."""
        x = image
        for i, (conv, relu) in enumerate(zip(self.convs, self.relus, strict=True)):
            x = relu(conv(F.max_pool2d(x, 2) if 0 < i < 4 else x))
        return self.head(F.relu(self.hidden(x.flatten(1))))


LOSS_TAPS = {**{f"relu{i + 1}": f"relus.{i}" for i in range(5)}, "output": ""}
LOW = ("relu1", "relu2", "relu3", "relu4", "relu5")
SEMANTIC = ("relu5", "output")


class JudgeNetwork(nn.Module):
    """Judges samples, and never trains a tokenizer: of another design than `LossNetwork`, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        specs = ((3, 24, 5, 2), (24, 48, 3, 2), (48, 48, 3, 1), (48, 72, 3, 2))
        self.stem = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, k, s, padding=k // 2), nn.BatchNorm2d(b), nn.SiLU())
                for a, b, k, s in specs
            )
        )
        self.hidden = nn.Linear(648, 48)
        self.head = nn.Linear(48, OUTPUTS)

    def features(self, image: Tensor) -> Tensor:
        """The 48 features `(B, 48)` that distances of sets of images are measured on."""
        return F.silu(self.hidden(self.stem(image).flatten(1)))

    def forward(self, image: Tensor) -> Tensor:
        """As `LossNetwork`."""
        return self.head(self.features(image))


class SmallBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and swish, beside the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, dim), nn.GroupNorm(8, dim)
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` in and out."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SmallEncoder(nn.Sequential):
    """Images `(B, 3, H, W)` to features `(B, z_dim, H/4, W/4)`."""

    def __init__(self, width: int = 48, z_dim: int = 16) -> None:
        super().__init__(
            nn.Conv2d(3, width // 2, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, 2, 1),
            SmallBlock(width),
            SmallBlock(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, z_dim, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Features.

        Raises:
            ValueError: other channels, or sides that are no multiples of 4.
        """
        check_image(image, 3, 4)
        return super().forward(image)


class SmallDecoder(nn.Module):
    """Features back to images.

    Args:
        width: channels at the lowest resolution.
        z_dim: channels of features.
        attention: what the second phase adds; it does nothing at first.
        blocks: residual blocks more at both resolutions, the stronger decoder of table 1.
    """

    def __init__(self, width: int = 48, z_dim: int = 16, *, attention: bool = False, blocks: int = 0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(z_dim, width, 3, padding=1)
        self.block1, self.block2 = SmallBlock(width), SmallBlock(width)
        self.extra = SpatialAttention(width, 2, groups=8, zero_init=True) if attention else nn.Identity()
        self.low = nn.Sequential(*(SmallBlock(width) for _ in range(blocks)))
        self.high = nn.Sequential(*(SmallBlock(width // 2) for _ in range(blocks)))
        self.norm_out = nn.GroupNorm(8, width)
        self.up = nn.ConvTranspose2d(width, width // 2, 4, 2, 1)
        self.out = nn.ConvTranspose2d(width // 2, 3, 4, 2, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive weight of the adversarial loss compares gradients at."""
        return self.out.weight

    def forward(self, z: Tensor) -> Tensor:
        """Images `(B, 3, 4h, 4w)` of features `(B, z_dim, h, w)`; values are not limited."""
        x = self.low(self.block2(self.extra(self.block1(self.conv_in(z)))))
        return self.out(F.silu(self.high(self.up(F.silu(self.norm_out(x))))))


def small_tokenizer(
    quantizer: VectorQuantizer, attention: bool = False, codebook_std: float = 0.3, blocks: int = 0
) -> Tokenizer:
    """The stand-in's tokenizer: 36 codes of an image of 24 x 24; 215,267 parameters with 64 codes of 16 channels.

    Args:
        quantizer: features to codes.
        attention: in the decoder, see `SmallDecoder`; 9,504 parameters more.
        codebook_std: deviation of the codes at first.
        blocks: of the decoder, see `SmallDecoder`.
    """
    nn.init.normal_(quantizer.embedding.weight, std=codebook_std)
    encoder = SmallEncoder(z_dim=quantizer.dim)  # drawn first: seeds stand for stored runs
    return Tokenizer(encoder, quantizer, SmallDecoder(z_dim=quantizer.dim, attention=attention, blocks=blocks))


def small_transformer(
    kind: str = "ar",
    codebook_size: int = 64,
    num_classes: int = 10,
    length: int = 36,
    dim: int = 64,
    depth: int = 3,
    num_heads: int = 4,
    dropout: float = 0.0,
) -> ARTransformer | MaskedTransformer:
    """The stand-in's transformer over codes, `ar` or `nar`; other arguments as of both classes.

    Raises:
        ValueError: another kind.
    """
    kinds = {"ar": ARTransformer, "nar": MaskedTransformer}
    if kind not in kinds:
        raise ValueError(f"unknown transformer kind {kind!r}: use {' or '.join(kinds)}")
    return kinds[kind](codebook_size, num_classes, length, dim, depth, num_heads, dropout=dropout)
