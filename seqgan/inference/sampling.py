"""Sampling codes from both transformers through one interface.

    sampler = ParallelSampler(steps=12)          # or ARSampler(top_k=600)
    codes = sampler(transformer, label, generator=torch.Generator().manual_seed(0))
    images = tokenizer.decode(codes)

`codes` and `known` keep given codes in place: completion for autoregressive models, inpainting for masked ones. With a
list of generators, one for each image, an image's noise does not depend on what else is in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqgan.models.autoregressive import ARTransformer
from seqgan.models.checks import check_codes, check_mask, class_labels
from seqgan.models.masked import MaskedTransformer
from seqgan.models.masking import mask_count, mask_ratio

CFG_SCHEDULES = ("constant", "linear")

#: Of all noise of a batch, or one for every image of it; None: torch's own.
Generators = torch.Generator | Sequence[torch.Generator] | None


def keep_likely(logits: Tensor, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Logits `(..., K)` with unlikely codes at minus infinity.

    Args:
        logits: after division by the temperature.
        top_k: keep that many, and what ties with the last of them; None: all.
        top_p: keep the fewest that together have this probability, at least one.

    Raises:
        ValueError: `top_k` below one, or `top_p` outside (0, 1].
    """
    _check_likely(top_k, top_p)
    if top_k is not None and top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(dim=-1)
        before = shares.cumsum(dim=-1) - shares  # what the more likely ones have already
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def _check_likely(top_k: int | None, top_p: float) -> None:
    if (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise ValueError(f"top_k={top_k} and top_p={top_p}: top_k must be at least 1 (or None), top_p in (0, 1]")


def _check_amounts(**amounts: float) -> None:
    for name, value in amounts.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: a finite number, 0 or more")


def guide(cond: Tensor, uncond: Tensor, weight: float, schedule: str = "constant", progress: float = 1.0) -> Tensor:
    """Classifier-free guidance of logits: `(1 + w) cond - w uncond`.

    Args:
        cond: logits with the class.
        uncond: logits without.
        weight: w.
        schedule: `constant`, or `linear`: w grows with `progress`.
        progress: of sampling, from 0 to 1.

    Raises:
        ValueError: an unknown schedule.
    """
    _check_schedule(schedule)
    weight = weight * progress if schedule == "linear" else weight
    return (1 + weight) * cond - weight * uncond


def _check_schedule(schedule: str) -> None:
    if schedule not in CFG_SCHEDULES:
        raise ValueError(f"unknown guidance schedule {schedule!r}: use {', '.join(CFG_SCHEDULES)}")


def gumbel(shape: tuple[int, ...], device: torch.device, generator: Generators = None) -> Tensor:
    """Gumbel noise `(B, ...)` in float32: its largest sum with logits is a sample of their softmax.

    Raises:
        ValueError: a list of generators that are not one for every row.
    """
    noise = torch.empty(shape, device=device)
    if generator is None or isinstance(generator, torch.Generator):
        noise.exponential_(generator=generator)
    else:
        for row, own in zip(noise, generator, strict=True):
            row.exponential_(generator=own)
    return -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


def decoding_steps(
    predict: Callable[[int, Tensor, Tensor], Tensor],
    codes: Tensor,
    known: Tensor,
    draw: Callable[[tuple[int, ...]], Tensor],
    steps: int = 12,
    schedule: str = "cosine",
    choice_temperature: float = 4.5,
) -> Iterator[Tensor]:
    """MaskGIT's parallel decoding (algorithm of its section 3.2).

    Every step samples all masked codes, and masks again those it is least sure of.

    Args:
        predict: step, codes `(B, N)` and mask `(B, N)` to logits `(B, N, K)`.
        codes: `(B, N)`; read where `known`.
        known: `(B, N)`, True where the code is given; these are never changed.
        draw: shape to Gumbel noise; called once for codes, `(B, N, K)`, and once for the choice, `(B, N)`, per step.
        steps: number of steps.
        schedule: how many stay masked, see `mask_ratio`.
        choice_temperature: of the noise in the choice, which falls to zero with the steps.

    Yields:
        All codes `(B, N)` after every step, before masking again.

    Raises:
        ValueError: no steps.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least one is needed")
    total = codes.shape[1]
    masked = ~known
    unknown = masked.sum(dim=1)
    for step in range(steps):
        logits = predict(step, codes, masked).float()
        sampled = (logits + draw(tuple(logits.shape))).argmax(dim=-1)
        codes = torch.where(masked, sampled, codes)
        yield codes
        chosen = logits.log_softmax(dim=-1).gather(-1, codes[..., None])[..., 0]
        temperature = choice_temperature * (1 - (step + 1) / steps)
        sure = chosen + temperature * draw(tuple(chosen.shape))
        sure = sure.masked_fill(~masked, torch.inf)
        count = mask_count(schedule, step, steps, masked.sum(dim=1), unknown)
        bar = sure.sort(dim=1).values.gather(1, count[:, None].clamp_max(total - 1))
        masked = sure < bar


@dataclass(frozen=True)
class ARSampler:
    """Codes one after the other in raster order.

    Attributes:
        temperature: divides logits; 0: the likeliest code.
        top_k: see `keep_likely`; None: all codes.
        top_p: see `keep_likely`.
        cfg: weight of guidance; needs a model with a null class.
        cached: keep keys and values of earlier positions; False computes everything anew at every step, for
            comparison.

    Raises:
        ValueError: a negative temperature or weight, `top_k` below one, or `top_p` outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    cfg: float = 0.0
    cached: bool = True

    def __post_init__(self) -> None:
        _check_amounts(temperature=self.temperature, cfg=self.cfg)
        _check_likely(self.top_k, self.top_p)

    @torch.no_grad()
    def __call__(
        self,
        model: ARTransformer,
        label: Tensor | None = None,
        batch: int = 1,
        *,
        generator: Generators = None,
        codes: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Sample codes `(B, N)`.

        Args:
            model: in eval mode.
            label: classes `(B,)`; None: an unconditional model.
            batch: B, where there is no label.
            generator: of the noise, on the model's device; a list of B has one for every image.
            codes: `(B, N)`, given ones.
            known: `(B, N)`, True where `codes` is to be kept.

        Raises:
            ValueError: guidance of a model without a null class; only one of `codes` and `known`, or of another shape,
                or with codes outside of the codebook; labels that are no classes of the model.
        """
        device = model.positions.device
        codes, known = _given(codes, known, label, batch, model)
        batch = codes.shape[0]
        start = model.start(label, batch, device)
        if self.cfg:
            if model.null_label is None:
                raise ValueError("guidance needs a model with null_class=True that was trained without labels at times")
            start = torch.cat([start, model.start(torch.full_like(start, model.null_label), batch, device)])
        tokens = start[:, None]
        cache = model.allocate(len(start)) if self.cached else None
        for position in range(model.length):
            if cache is None:
                logits = model.token_logits(tokens)[:, -1]
            else:
                logits = model.step(tokens[:, -1], position, cache)
            logits = logits[:, : model.codebook_size].float()
            if self.cfg:
                logits = guide(*logits.chunk(2), self.cfg)
            drawn = torch.where(known[:, position], codes[:, position], self._draw(logits, generator))
            tokens = torch.cat([tokens, (drawn.repeat(2) if self.cfg else drawn)[:, None]], dim=1)
        return tokens[:batch, 1:]

    def _draw(self, logits: Tensor, generator: Generators) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        likely = keep_likely(logits / self.temperature, self.top_k, self.top_p)
        return (likely + gumbel(tuple(likely.shape), likely.device, generator)).argmax(dim=-1)


@dataclass(frozen=True)
class ParallelSampler:
    """All codes in a few steps (MaskGIT).

    Attributes:
        steps: number of steps.
        schedule: how many codes stay masked, see `mask_ratio`.
        choice_temperature: randomness of which codes are kept.
        temperature: divides logits; 0: the likeliest codes.
        cfg: weight of guidance.
        cfg_schedule: `constant`, or `linear` in the step.

    Raises:
        ValueError: no steps, an unknown schedule, or a negative temperature or weight.
    """

    steps: int = 12
    schedule: str = "cosine"
    choice_temperature: float = 4.5
    temperature: float = 1.0
    cfg: float = 0.0
    cfg_schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least one is needed")
        _check_amounts(choice_temperature=self.choice_temperature, temperature=self.temperature, cfg=self.cfg)
        mask_ratio(self.schedule, torch.ones(()), 2)
        _check_schedule(self.cfg_schedule)

    @torch.no_grad()
    def __call__(
        self,
        model: MaskedTransformer,
        label: Tensor | None = None,
        batch: int = 1,
        *,
        generator: Generators = None,
        codes: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Sample codes `(B, N)`; arguments as of `ARSampler`."""
        device = model.head_bias.device
        codes, known = _given(codes, known, label, batch, model)
        label = class_labels(label, model.num_classes, model.null_label, len(codes), device)
        nothing_known = not bool(known.any())

        def predict(step: int, codes: Tensor, masked: Tensor) -> Tensor:
            if step == 0 and nothing_known:
                # With everything masked, images of one class are predicted alike: once is enough.
                classes, which = label.unique(return_inverse=True)
                count = len(classes)
                logits = self._logits(model, codes[:count], masked[:count], classes, step)[which]
            else:
                logits = self._logits(model, codes, masked, label, step)
            return logits / self.temperature if self.temperature else logits

        def draw(shape: tuple[int, ...]) -> Tensor:
            if len(shape) == 3 and self.temperature == 0:
                return torch.zeros((), device=device)
            return gumbel(shape, device, generator)

        states = decoding_steps(predict, codes, known, draw, self.steps, self.schedule, self.choice_temperature)
        for _ in range(self.steps - 1):
            next(states)
        return next(states)

    def _logits(self, model: MaskedTransformer, codes: Tensor, masked: Tensor, label: Tensor, step: int) -> Tensor:
        if not self.cfg:
            return model(codes, masked, label)
        labels = torch.cat([label, torch.full_like(label, model.null_label)])
        cond, uncond = model(codes.repeat(2, 1), masked.repeat(2, 1), labels).chunk(2)
        return guide(cond, uncond, self.cfg, self.cfg_schedule, step / max(self.steps - 1, 1))


def _given(
    codes: Tensor | None,
    known: Tensor | None,
    label: Tensor | None,
    batch: int,
    model: ARTransformer | MaskedTransformer,
) -> tuple[Tensor, Tensor]:
    """Given codes and where they are, `(B, N)` each."""
    length, device = model.length, model.tokens.weight.device
    batch = batch if label is None else len(label)
    if batch < 1:
        raise ValueError("nothing to sample: give at least one label, or a batch of at least one")
    if (codes is None) != (known is None):
        raise ValueError("give both codes and known, or neither: known says which codes are kept")
    if codes is not None and known is not None:
        batch = len(codes) if label is None else batch
        if codes.shape != (batch, length) or known.shape != codes.shape:
            shapes = f"codes {tuple(codes.shape)}, known {tuple(known.shape)}"
            raise ValueError(f"{shapes}: both must be ({batch}, {length}), an image a row")
        check_mask(known, codes, "known")
        check_codes(codes, model.codebook_size, read=known)
        return codes, known
    return (
        torch.zeros(batch, length, dtype=torch.long, device=device),
        torch.zeros(batch, length, dtype=torch.bool, device=device),
    )
