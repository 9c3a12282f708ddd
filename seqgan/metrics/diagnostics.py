"""What a tokenizer's codes are like: how many are in use, and how well a transformer predicts them (section 3.2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqgan.models import ARTransformer, Tokenizer
from seqgan.models.entropy import entropy


class CodeUsage(NamedTuple):
    """Use of a codebook over a set of images.

    counts: how often each code occurs, `(K,)` int64.
    usage: share of codes that occur at all.
    perplexity: exp of the entropy of the histogram; K when all are used alike.
    """

    counts: Tensor
    usage: Tensor
    perplexity: Tensor


def code_histogram(indices: Tensor, size: int) -> Tensor:
    """How often each of `size` codes occurs in `indices` of any shape: `(size,)`. Histograms of batches add up."""
    return indices.flatten().bincount(minlength=size)


def codebook_usage(counts: Tensor) -> CodeUsage:
    """Usage and perplexity from a histogram `(K,)`.

    Raises:
        ValueError: a histogram of nothing.
    """
    total = counts.sum()
    if total == 0:
        raise ValueError("no codes were counted: give at least one image")
    shares = counts.double() / total
    return CodeUsage(counts, (counts > 0).double().mean(), entropy(shares).exp())


class TeacherForced(NamedTuple):
    """Predictions of every code from the true ones before it.

    logits: `(B, N, K)`.
    predicted: the likeliest code at each place, `(B, N)`.
    nll: in nats, `(B, N)`.
    accuracy: share of codes that are predicted rightly.
    bits: mean per code.
    """

    logits: Tensor
    predicted: Tensor
    nll: Tensor
    accuracy: Tensor
    bits: Tensor


@torch.no_grad()
def teacher_forced(model: ARTransformer, codes: Tensor, label: Tensor | None = None) -> TeacherForced:
    """How predictable codes `(B, N)` are, in one pass."""
    logits = model(codes, label).float()
    predicted = logits.argmax(dim=-1)
    nll = F.cross_entropy(logits.movedim(-1, 1), codes, reduction="none")
    accuracy = (predicted == codes).double().mean()
    return TeacherForced(logits, predicted, nll, accuracy, nll.double().mean() / math.log(2))


@torch.no_grad()
def predicted_images(
    tokenizer: Tokenizer, model: ARTransformer, image: Tensor, label: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The paper's pictures of predictability: images decoded from true and from predicted codes.

    Args:
        tokenizer: whose codes the transformer knows.
        model: in eval mode.
        image: `(B, 3, H, W)` in [-1, 1].
        label: `(B,)`.

    Returns:
        Both `(B, 3, H, W)`, within [-1, 1].
    """
    codes = tokenizer.encode(image)
    predicted = teacher_forced(model, codes.flatten(1), label).predicted.view_as(codes)
    return tokenizer.decode(codes).clamp(-1, 1), tokenizer.decode(predicted).clamp(-1, 1)
