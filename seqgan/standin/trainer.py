"""The stand-in's last stage: a transformer over codes, evaluated with both decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.data import derive_seed
from core.errors import ConfigError
from core.trainer import Batch
from seqgan.data.codes import CodeCache
from seqgan.inference.files import SampleRequest
from seqgan.inference.sampling import ARSampler, ParallelSampler
from seqgan.models import ARTransformer, MaskedTransformer, Tokenizer
from seqgan.trainer import TransformerTrainer


class TwoDecoderTransformer(TransformerTrainer):
    """A transformer on the codes of the first phase, whose samples the decoders of both phases show.

    Args:
        network: the transformer.
        tokenizer: of the first phase.
        second: of the second phase; it has to have the same encoder and codebook.
        cache: see `TransformerTrainer`.
        sample_seed: of the noise of samples.
        steps: of a masked transformer's sampler.
        smoothing: see `TransformerTrainer`.
        request: what `tools/infer.py` makes, see `TransformerTrainer`.
    """

    def __init__(
        self,
        network: ARTransformer | MaskedTransformer,
        tokenizer: Tokenizer,
        second: Tokenizer,
        cache: CodeCache | None = None,
        sample_seed: int = 0,
        steps: int = 12,
        smoothing: float = 0.1,
        request: SampleRequest | None = None,
    ) -> None:
        sampler = ARSampler() if isinstance(network, ARTransformer) else ParallelSampler(steps)
        super().__init__(
            network, tokenizer, cache, smoothing=smoothing, sampler=sampler, request=request, frozen=("second",)
        )
        self.second, self.sample_seed = second, sample_seed
        self.sanity_check = False  # predictions hold samples

    def predict(self, batch: Batch) -> dict[str, Any]:
        """What `ShapeReport` reads: likelihoods, codes, reconstructions and samples, of both decoders.

        Raises:
            ConfigError: the second phase's tokenizer has other codes.
        """
        if self.second.fingerprint() != self.tokenizer.fingerprint():
            raise ConfigError(
                "the second phase's tokenizer has another encoder or codebook than the one whose codes the transformer "
                "learnt: load both from one first phase"
            )
        image = batch["image"]
        codes = self.tokenizer.encode(image)
        drawn = self.sample(batch["asked"], int(batch["sample_id"][0].rpartition("-")[2]))
        return {
            **super().predict({**batch, "codes": codes}),
            "image": image,
            "asked": batch["asked"],
            "codes": codes.flatten(1),
            "codes2": self.second.encode(image).flatten(1),
            "reconstruction1": self.tokenizer.decode(codes).clamp(-1, 1),
            "reconstruction2": self.second.decode(codes).clamp(-1, 1),
            "sample1": self.tokenizer.decode(drawn).clamp(-1, 1),
            "sample2": self.second.decode(drawn).clamp(-1, 1),
        }

    def sample(self, label: Tensor, number: int = 0) -> Tensor:
        """Codes `(B, N)` of classes `(B,)` at temperature 1; noise follows from `sample_seed` and `number`."""
        generator = torch.Generator(label.device).manual_seed(derive_seed(self.sample_seed, number) % 2**63)
        return self.sampler(self.network, label, generator=generator)
