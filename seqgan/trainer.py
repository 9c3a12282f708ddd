"""What one step is: of a tokenizer with its discriminator, in both phases, and of a transformer over codes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.engine.state.randomness import own_rows
from core.errors import ConfigError
from core.trainer import Batch, Inference, Trainer
from seqgan.data.codes import CodeCache
from seqgan.inference.files import (
    REQUESTS,
    SampleRequest,
    complete_picture,
    predict_picture,
    read_request,
    reconstruct_picture,
    reconstructions,
    samples,
    tokenizer_of,
)
from seqgan.inference.generation import Generator, check_codes, spread_labels
from seqgan.inference.pictures import grid, strips, to_pixels
from seqgan.inference.sampling import ARSampler, ParallelSampler
from seqgan.losses.perceptual import SemanticPerceptualLoss
from seqgan.losses.terms import (
    adaptive_weight,
    autoregressive_loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    masked_loss,
    started,
)
from seqgan.metrics.diagnostics import codebook_usage, predicted_images
from seqgan.models import ARTransformer, MaskedTransformer, Tokenizer, training_mask

# In the second phase; `TokenizerTrainer(frozen=...)` takes them.
CODES = ("network.encoder", "network.quant_conv", "network.quantizer")
# Steps without use after which the log calls a code dead.
DEAD_AFTER = 100


class TokenizerTrainer(Trainer):
    """A tokenizer: L1, perceptual, quantiser's and adversarial losses (equation 2, section 3.4).

    In the second phase the decoder alone is trained: `frozen` names `CODES`, the quantiser's terms are left out, and
    the network has an enhanced decoder and starts from the first phase's weights.

    A discriminator is trained from the first step on, also before its loss reaches the decoder. With one there are two
    optimizers, `network` and `discriminator` (of one config or each of its own); otherwise one.

    Args:
        network: the tokenizer.
        perceptual: of reconstruction and image; None: none.
        perceptual_weight: of it.
        discriminator: of images; None: no adversarial loss.
        adversarial: `logistic` (MaskGIT) or `hinge` (VQGAN), see `discriminator_loss`.
        adversarial_weight: of the generator's loss.
        adaptive: multiply it with the ratio of gradients at the decoder's last layer.
        discriminator_factor: of the discriminator's loss.
        adversarial_start: step from which the generator's loss counts.
        adversarial_ramp: steps over which its weight then grows.
        penalty: cost of squared gradients of the discriminator at real images; 0: none.
        penalty_every: compute that every so many steps, with as many times the cost.
        input_shape: `(3, H, W)`, for profiles.
        frozen: see `core.Trainer`.

    Raises:
        ValueError: `penalty_every` below one.
    """

    def __init__(
        self,
        network: Tokenizer,
        perceptual: SemanticPerceptualLoss | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial: str = "logistic",
        adversarial_weight: float = 0.1,
        adaptive: bool = False,
        discriminator_factor: float = 1.0,
        adversarial_start: int = 0,
        adversarial_ramp: int = 0,
        penalty: float = 10.0,
        penalty_every: int = 16,
        input_shape: Sequence[int] | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        if penalty_every < 1:
            raise ValueError(f"penalty_every={penalty_every}: at least 1")
        super().__init__((*frozen, "perceptual") if perceptual is not None else frozen)
        self.network, self.perceptual, self.discriminator = network, perceptual, discriminator
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        self.adversarial, self.adaptive, self.discriminator_factor = adversarial, adaptive, discriminator_factor
        self.adversarial_start, self.adversarial_ramp = adversarial_start, adversarial_ramp
        self.penalty, self.penalty_every = penalty, penalty_every
        self.optimizer_parts = () if discriminator is None else ("network", "discriminator")
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        # Step in which every code was last used, for the log; it begins anew when a run goes on.
        self.register_buffer("last_use", torch.zeros(network.quantizer.size, dtype=torch.long), persistent=False)
        self._step = 0
        self._made: Tensor | None = None

    def inference_network(self) -> nn.Module:
        """The tokenizer."""
        return self.network

    def train_step(self, data: Batch, optim_wrapper: Any) -> dict[str, Tensor]:
        """The tokenizer's update, then the discriminator's on the same reconstruction."""
        self._step = int(self.steps)
        if self.discriminator is None:
            logs = self.phase("losses", data, optim_wrapper)
        else:
            with optim_wrapper.only("network"):
                logs = self.phase("losses", data, optim_wrapper["network"])
            with optim_wrapper.only("discriminator"):
                second = self.phase("discriminator_losses", data, optim_wrapper["discriminator"])
            logs = {**second, **logs, "loss": logs["loss"] + second["loss"]}
        self._made = None
        self.steps += 1
        return logs

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The tokenizer's weighted terms; `layer_*` are the perceptual loss' taps before weighting.

        Of the codebook: `codes_in_batch`, their `perplexity`, and `dead_codes`, unused for `DEAD_AFTER` steps.
        """
        image = batch["image"]
        made, indices, terms = self.network(image)
        self._made = made.detach()
        found = {"loss_l1": (made.float() - image.float()).abs().mean()}
        reconstruction = found["loss_l1"]
        if self.perceptual is not None:
            value, layers = self.perceptual(made, image)
            found["loss_perceptual"] = self.perceptual_weight * value
            found |= {f"layer_{name}": term for name, term in layers.items()}
            reconstruction = reconstruction + found["loss_perceptual"]
        if "network.quantizer" not in self.frozen:
            found |= {f"loss_{name}": term for name, term in terms.items()}
        if self.discriminator is not None:
            found |= self._against(made, reconstruction)
        return found | self._use(indices)

    @torch.no_grad()
    def _use(self, indices: Tensor) -> dict[str, Tensor]:
        flat = indices.flatten()
        counts = torch.zeros_like(self.last_use).index_add_(0, flat, torch.ones_like(flat))
        self.last_use.masked_fill_(counts > 0, self._step)
        return {
            "codes_in_batch": (counts > 0).sum().float(),
            "perplexity": codebook_usage(counts).perplexity.float(),
            "dead_codes": (self._step - self.last_use >= DEAD_AFTER).sum().float(),
        }

    def _against(self, made: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        factor = started(self._step, self.adversarial_start, 1.0, self.adversarial_ramp)
        value = generator_loss(self.discriminator(made).float(), self.adversarial)
        weight = made.new_tensor(self.adversarial_weight)
        if self.adaptive and torch.is_grad_enabled():
            last = self.network.decoder.last_layer
            weight = adaptive_weight(reconstruction, value, last, self.adversarial_weight)
        return {"loss_adversarial": factor * weight * value, "adversarial_weight": weight}

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The discriminator's loss, and every `penalty_every` steps the penalty of its gradients."""
        image = batch["image"]
        if self._made is None:
            with torch.no_grad():
                self._made = self.network(image).reconstruction
        real, fake = self.discriminator(image).float(), self.discriminator(self._made).float()
        found = {
            "loss_discriminator": discriminator_loss(real, fake, self.adversarial, self.discriminator_factor),
            "logit_real": real.detach().mean(),
            "logit_fake": fake.detach().mean(),
        }
        if self.penalty and self._step % self.penalty_every == 0:
            cost = self.penalty * self.penalty_every
            found["loss_penalty"] = cost * gradient_penalty(self.discriminator, image)
        return found

    def predict(self, batch: Batch) -> dict[str, Any]:
        """`image` and `reconstruction` `(B, 3, H, W)` in [-1, 1], `indices` `(B, h, w)`, `features` `(B, C, h, w)`.

        Features are those before quantisation.
        """
        features = self.network.features(batch["image"])
        z_q, indices, _ = self.network.quantizer(features)
        made = self.network.decoder(self.network.post_quant_conv(z_q))
        kept = {key: batch[key] for key in ("image", "label", "sample_id") if key in batch}
        return {**kept, "reconstruction": made.clamp(-1, 1), "indices": indices, "features": features}

    def media(self, batch: Batch) -> dict[str, np.ndarray]:
        """Image, reconstruction and codes of every sample."""
        made, indices, _ = self.network(batch["image"])
        return {"reconstructions": reconstructions(self.network, batch["image"], made, indices)}

    def infer(self, file: Path) -> Inference:
        """A picture, its reconstruction and its codes; see `seqgan.inference.files.reconstruct_picture`.

        Raises:
            ConfigError: a request for samples, which a transformer makes.
        """
        if file.suffix in REQUESTS:
            raise ConfigError(f"{file}: a tokenizer shows pictures; samples are made by the run of a transformer")
        side = None if self.input_shape is None else self.input_shape[-1]
        return reconstruct_picture(self.network, file, side, self.device)

    def table_figures(self, cfg: Any) -> dict[str, int]:
        """`codebook`, its size, `code_channels`, and `codes` of an image of `input_shape`."""
        weight = self.network.quantizer.embedding.weight
        figures = {"codebook": weight.shape[0], "code_channels": weight.shape[1]}
        if self.input_shape is not None:
            features = self.network.features(torch.zeros(1, *self.input_shape, device=weight.device))
            figures["codes"] = features.shape[-2] * features.shape[-1]
        return figures


class TransformerTrainer(Trainer):
    """A transformer over codes: cross-entropy of all codes, or of the masked ones.

    A batch has `codes` `(B, N)` or `(B, h, w)` of a cache; or `image`, which the tokenizer encodes in every step. With
    several classes it has `label` `(B,)`.

    Args:
        network: an `ARTransformer` or a `MaskedTransformer`.
        tokenizer: frozen; None: batches have codes.
        cache: where codes of the training images are kept; None: the tokenizer runs in every step.
        label_drop: share of images whose class is hidden, for guidance.
        smoothing: of labels, for masked codes.
        min_mask_rate: smallest share of masked codes in training.
        mask_seed: of the masks of evaluation.
        sampler: how codes are drawn; None: the transformer's with its defaults.
        request: what is generated by `tools/infer.py`; None: see `SampleRequest`.
        sample_evaluation: predictions have `sample`, an image of every sample's class, for `SampleQuality`.
        frozen: see `core.Trainer`.

    A checkpoint remembers the fingerprint of the tokenizer whose codes were learnt.

    Raises:
        ValueError: labels are to be dropped, but the network has no "no class"; a cache without a tokenizer.
    """

    def __init__(
        self,
        network: ARTransformer | MaskedTransformer,
        tokenizer: Tokenizer | None = None,
        cache: CodeCache | None = None,
        label_drop: float = 0.0,
        smoothing: float = 0.1,
        min_mask_rate: float = 0.0,
        mask_seed: int = 0,
        sampler: ARSampler | ParallelSampler | None = None,
        request: SampleRequest | None = None,
        sample_evaluation: bool = False,
        frozen: Sequence[str] = (),
    ) -> None:
        if label_drop and network.null_label is None:
            raise ValueError("label_drop needs a network with null_class=True")
        if cache is not None and tokenizer is None:
            raise ValueError("a cache of codes is filled by a tokenizer: give one")
        super().__init__((*frozen, "tokenizer") if tokenizer is not None else frozen)
        self.network, self.tokenizer, self.cache = network, tokenizer, cache
        self.label_drop, self.smoothing, self.min_mask_rate = label_drop, smoothing, min_mask_rate
        self.mask_seed, self.sample_evaluation = mask_seed, sample_evaluation
        self.sanity_check = not sample_evaluation  # sampling a batch takes long
        self.sampler, self.request = sampler, SampleRequest() if request is None else request
        self._decoders: dict[str, Tokenizer] = {}  # of other runs, read and compared once; no part of the model
        # SHA-256 of the tokenizer whose codes were learnt; zeros: not known.
        self.register_buffer("learnt_codes", torch.zeros(32, dtype=torch.uint8))

    def inference_network(self) -> nn.Module:
        """The transformer."""
        return self.network

    def training_data(self, dataset: Dataset) -> Dataset:
        """The codes of a data set's images where there is a `cache`, which is filled first.

        Raises:
            ConfigError: an earlier run of this transformer learnt the codes of another tokenizer.
        """
        if self.tokenizer is not None:
            self.check_tokenizer()
            own = list(bytes.fromhex(self.tokenizer.fingerprint()))
            self.learnt_codes.copy_(torch.tensor(own, dtype=torch.uint8))
        if self.cache is None or not self.keeps_data or self.tokenizer is None:
            return dataset
        return self.cache.fill(dataset, self.tokenizer)

    def evaluation_data(self, dataset: Dataset) -> Dataset:
        """The codes beside the images of an evaluation, where the `cache` keeps them, too."""
        if self.cache is None or not (self.cache.evaluation and self.keeps_data) or self.tokenizer is None:
            return dataset
        return self.cache.fill(dataset, self.tokenizer, beside=True)

    def check_tokenizer(self) -> None:
        """Holds the tokenizer against the one whose codes were learnt, where that is known.

        Raises:
            ConfigError: they differ.
        """
        if self.tokenizer is not None and self.learnt_codes.any():
            check_codes(bytes(self.learnt_codes.tolist()).hex(), self.tokenizer)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_codes` in nats per code, and the share of codes that are predicted rightly, `accuracy`.

        Masks and dropped labels are those of one process with the joint batch, however many there are.
        """
        codes, label = self.codes(batch), self._label(batch)
        if label is not None and self.label_drop:
            hidden = own_rows(lambda rows: torch.rand(rows, device=label.device), len(label)) < self.label_drop
            label = torch.where(hidden, self.network.null_label, label)
        if isinstance(self.network, ARTransformer):
            logits, mask = self.network(codes, label), torch.ones_like(codes, dtype=torch.bool)
            loss = autoregressive_loss(logits, codes)
        else:
            count, length = codes.shape
            ratio = own_rows(lambda rows: torch.rand(rows, device=codes.device), count)
            score = own_rows(lambda rows: torch.rand(rows, length, device=codes.device), count)
            mask = training_mask(ratio, score, self.min_mask_rate)
            logits = self.network(codes, mask, label)
            loss = masked_loss(logits, codes, mask, self.smoothing)
        right = (logits.detach().argmax(dim=-1) == codes)[mask]
        return {"loss_codes": loss, "accuracy": right.float().mean()}

    def codes(self, batch: Batch) -> Tensor:
        """Codes `(B, N)` int64 of a batch.

        Raises:
            KeyError: it has neither codes nor, with a tokenizer, images.
        """
        if "codes" in batch:
            return batch["codes"].long().flatten(1)
        if self.tokenizer is None:
            raise KeyError("the batch has no 'codes': train from a cache of codes, or give the trainer a tokenizer")
        return self.tokenizer.encode(batch["image"]).flatten(1)

    def _label(self, batch: Batch) -> Tensor | None:
        return batch["label"] if self.network.num_classes > 1 else None

    def predict(self, batch: Batch) -> dict[str, Any]:
        """`nll` in nats, `right` and `mask`, `(B, N)` each: of all codes, or of those masked by a fixed draw."""
        codes, label = self.codes(batch), self._label(batch)
        mask = torch.ones_like(codes, dtype=torch.bool)
        if isinstance(self.network, ARTransformer):
            logits = self.network(codes, label)
        else:
            generator = torch.Generator().manual_seed(self.mask_seed)
            ratio, score = torch.rand(len(codes), generator=generator), torch.rand(codes.shape, generator=generator)
            mask = training_mask(ratio, score, self.min_mask_rate).to(codes.device)
            logits = self.network(codes, mask, label)
        nll = nn.functional.cross_entropy(logits.movedim(-1, 1).float(), codes, reduction="none")
        kept = {key: batch[key] for key in ("image", "label", "sample_id") if key in batch}
        found = {**kept, "nll": nll, "right": logits.argmax(dim=-1) == codes, "mask": mask}
        if self.sample_evaluation:
            found["sample"] = self._sample_like(batch, label)
        return found

    def _sample_like(self, batch: Batch, label: Tensor | None) -> Tensor:
        """An image for each sample, of its class, uint8 `(B, 3, H, W)`; its noise is that of the sample's name."""
        made = self.generator()
        labels = [0] * len(batch["sample_id"]) if label is None else label.tolist()
        numbers = [int(hashlib.sha256(str(name).encode()).hexdigest()[:12], 16) for name in batch["sample_id"]]
        drawn = made.codes(labels, self.request.seed, self.request.batch, numbers=numbers)
        pixels = [torch.from_numpy(to_pixels(made.tokenizer.decode(codes))) for codes in drawn]
        return torch.cat(pixels).movedim(-1, 1).to(self.device)

    def generator(self, request: SampleRequest | None = None) -> Generator:
        """Transformer, tokenizer and sampler together; the decoder is that of the request's tokenizer, if it names one.

        Raises:
            ConfigError: no tokenizer, or one that makes other codes than those learnt.
        """
        if self.tokenizer is None:
            raise ConfigError("images need a tokenizer: give model.tokenizer the one whose codes the transformer knows")
        self.check_tokenizer()
        made, other = Generator(self.tokenizer, self.network, self.sampler), (request or self.request).tokenizer
        if other is None:
            return made
        if other not in self._decoders:
            self._decoders[other] = made.with_decoder(tokenizer_of(other)).tokenizer
        return Generator(self._decoders[other].to(self.device), self.network, self.sampler)

    def generate(self) -> Inference:
        """Samples as `request` asks for; see `seqgan.inference.files.samples`."""
        return samples(self.generator(), self.request)

    def infer(self, file: Path) -> Inference:
        """Samples for a file of labels or a request; of a picture completions, or with AR predictions of its codes."""
        if file.suffix in REQUESTS:
            asked = read_request(file, self.request)
            return samples(self.generator(asked), asked)
        if isinstance(self.network, ARTransformer) and self.request.keep is None:
            return predict_picture(self.generator(), file, self.request)
        return complete_picture(self.generator(), file, self.request)

    def media(self, batch: Batch) -> dict[str, np.ndarray]:
        """Samples of the batch's classes; with AR, images beside their reconstructions and predictions."""
        if self.tokenizer is None:
            return {}
        made, label = self.generator(), self._label(batch)
        count = len(batch["sample_id"])
        labels = spread_labels(count, self.network.num_classes) if label is None else label.tolist()
        shown = {"samples": grid(made.sample(labels, self.request.seed, self.request.batch))}
        if "image" in batch and isinstance(self.network, ARTransformer):
            decoded = predicted_images(made.tokenizer, self.network, batch["image"], label)
            shown["predictions"] = strips(*(to_pixels(part) for part in (batch["image"], *decoded)))
        return shown

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[Any, ...]:
        """Codes, for masked transformers a mask, and labels, all of zeros."""
        codes = torch.zeros(batch_size, self.network.length, dtype=torch.long, device=device)
        mask = () if isinstance(self.network, ARTransformer) else (torch.ones_like(codes, dtype=torch.bool),)
        return (codes, *mask, codes[:, 0])

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """Codes and labels of zeros."""
        codes, *_, label = self.example_inputs(batch_size, device)
        return {"codes": codes, "label": label, "sample_id": [str(i) for i in range(batch_size)]}

    def table_figures(self, cfg: Any) -> dict[str, int]:
        """`steps` of sampling an image, and parameters together with the tokenizer's, `parameters_with_tokenizer`."""
        ar = isinstance(self.network, ARTransformer)
        sampler = ParallelSampler() if self.sampler is None else self.sampler
        parts = [part for part in (self.network, self.tokenizer) if part is not None]
        return {
            "steps": self.network.length if ar else sampler.steps,
            "parameters_with_tokenizer": sum(p.numel() for part in parts for p in part.parameters()),
        }
