"""Images from a transformer and a tokenizer: samples of classes, completion and inpainting.

    generator = Generator(tokenizer, transformer, ParallelSampler(steps=12))
    images = generator.sample([207, 360], seed=0)                     # uint8 (2, H, W, 3)
    filled = generator.complete(image, hidden, label=[207])           # what is hidden is painted anew
    better = generator.with_decoder(second_phase_tokenizer)           # the same codes, another decoder

Every image has noise of its own, from the seed and its number, so what is drawn does not depend on how images are
batched, up to the rounding of networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.data import derive_seed
from core.errors import ConfigError
from seqgan.inference.pictures import to_pixels
from seqgan.inference.sampling import ARSampler, ParallelSampler
from seqgan.models import ARTransformer, MaskedTransformer, Tokenizer


def check_codes(expected: str, tokenizer: Tokenizer, what: str = "this tokenizer") -> None:
    """Holds a tokenizer against the fingerprint of the one whose codes a transformer knows.

    Raises:
        ConfigError: it makes other codes.
    """
    found = tokenizer.fingerprint()
    if found != expected:
        raise ConfigError(
            f"the transformer was trained on codes of the tokenizer {expected[:12]}, but {what} is {found[:12]}: its "
            "encoder or codebook differs. Give the tokenizer of that run's first phase, or a second phase that was "
            "trained from it (frozen encoder and quantizer), or train a transformer on this one's codes"
        )


def spread_labels(count: int, num_classes: int) -> list[int]:
    """`count` labels, as many of every class as possible; fewer images than classes are spread over all of them."""
    if count < num_classes:
        return [i * num_classes // count for i in range(count)]
    return [i % num_classes for i in range(count)]


class Generator:
    """A transformer, the tokenizer whose codes it knows, and how codes are drawn.

    Args:
        tokenizer: of either phase.
        transformer: trained on its codes.
        sampler: `ARSampler` or `ParallelSampler`; None: the one for this transformer, with its defaults.

    Raises:
        ConfigError: the codebook has another size than the transformer's, or the sampler is for another kind.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: ARTransformer | MaskedTransformer,
        sampler: ARSampler | ParallelSampler | None = None,
    ) -> None:
        if tokenizer.quantizer.size != transformer.codebook_size:
            raise ConfigError(
                f"a codebook of {tokenizer.quantizer.size} codes, but a transformer for {transformer.codebook_size}: "
                "give the tokenizer that the transformer was trained with"
            )
        kind = ARSampler if isinstance(transformer, ARTransformer) else ParallelSampler
        if sampler is not None and not isinstance(sampler, kind):
            raise ConfigError(f"{type(sampler).__name__} does not draw from a {type(transformer).__name__}: {kind}")
        self.tokenizer, self.transformer = tokenizer.eval(), transformer.eval()
        self.sampler = kind() if sampler is None else sampler

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.tokens.weight.device

    def with_decoder(self, tokenizer: Tokenizer) -> Generator:
        """The same with another tokenizer's decoder, e.g. the second phase's.

        Raises:
            ConfigError: its encoder or codebook differ, so that codes would mean something else.
        """
        check_codes(self.tokenizer.fingerprint(), tokenizer, "the tokenizer given for decoding")
        return Generator(tokenizer.to(self.device), self.transformer, self.sampler)

    def codes(
        self,
        labels: Sequence[int],
        seed: int = 0,
        batch: int = 16,
        first: int = 0,
        *,
        given: Tensor | None = None,
        known: Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Codes `(B, N)`, batch by batch.

        Args:
            labels: class of each image; of an unconditional transformer they only count.
            seed: of all noise.
            batch: images at a time.
            first: number of the first image; image `first + i` has the noise of that number.
            given: codes `(len(labels), N)` that are kept where `known`.
            known: `(len(labels), N)`.
            numbers: of the images, in place of those counted from `first` on.

        Raises:
            ConfigError: a label that is no class, or no label; no batch.
        """
        if not len(labels):
            raise ConfigError("labels=[]: no image is asked for, give the class of each")
        if batch < 1:
            raise ConfigError(f"batch={batch}: at least 1")
        classes = self.transformer.num_classes
        wrong = [label for label in labels if not 0 <= label < classes]
        if wrong and classes > 1:
            raise ConfigError(f"label {wrong[0]}: the transformer knows classes 0 to {classes - 1}")
        numbers = range(first, first + len(labels)) if numbers is None else numbers
        for start in range(0, len(labels), batch):
            part = slice(start, start + batch)
            count = len(labels[part])
            noise = [torch.Generator(self.device).manual_seed(derive_seed(seed, n)) for n in numbers[part]]
            label = torch.tensor(list(labels[part]), device=self.device) if classes > 1 else None
            kept = {} if given is None or known is None else {"codes": given[part], "known": known[part]}
            yield self.sampler(self.transformer, label, count, generator=noise, **kept)

    @torch.no_grad()
    def sample(self, labels: Sequence[int], seed: int = 0, batch: int = 16, first: int = 0) -> np.ndarray:
        """Images of classes, uint8 `(len(labels), H, W, 3)`; arguments as of `codes`."""
        return np.concatenate(
            [to_pixels(self.tokenizer.decode(codes)) for codes in self.codes(labels, seed, batch, first)]
        )

    @torch.no_grad()
    def complete(
        self,
        image: Tensor,
        hidden: Tensor,
        label: Sequence[int],
        seed: int = 0,
        batch: int = 16,
        *,
        paste: bool = True,
    ) -> np.ndarray:
        """Paint anew what is hidden of images; one picture for each label.

        A code is drawn anew where any of its pixels is hidden. An autoregressive transformer sees only codes above and
        to the left; use a masked one for holes.

        Args:
            image: `(3, H, W)` in [-1, 1].
            hidden: `(H, W)`, True where pixels are to be made.
            label: classes, one for each picture to be made.
            seed: of the noise.
            batch: pictures at a time.
            paste: put the known pixels back; False: all of it is decoded from codes.

        Returns:
            uint8 `(len(label), H, W, 3)`.

        Raises:
            ValueError: image and mask differ in size, or make another number of codes than the transformer's.
        """
        if image.shape[-2:] != hidden.shape:
            raise ValueError(f"an image of {tuple(image.shape[-2:])}, but a mask of {tuple(hidden.shape)} pixels")
        image = image.to(self.device)
        codes = self.tokenizer.encode(image[None])
        if codes[0].numel() != self.transformer.length:
            raise ValueError(f"{codes[0].numel()} codes, but the transformer makes {self.transformer.length}")
        known = ~code_mask(hidden.to(self.device), tuple(codes.shape[1:]))
        many = len(label)
        given, kept = (part.reshape(1, -1).expand(many, -1) for part in (codes, known))
        made = []
        for drawn in self.codes(label, seed, batch, given=given, known=kept):
            decoded = self.tokenizer.decode(drawn.view(-1, *codes.shape[1:]))
            if paste:
                decoded = torch.where(hidden.to(self.device), decoded, image)
            made.append(to_pixels(decoded))
        return np.concatenate(made)


def code_mask(hidden: Tensor, size: tuple[int, int]) -> Tensor:
    """Codes `(h, w)` of which any pixel of `(H, W)` is hidden."""
    return torch.nn.functional.adaptive_max_pool2d(hidden[None].float(), size)[0] > 0
