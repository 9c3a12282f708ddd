"""Losses of STViT: DeiT's and Swin's recipe for classification (section 4.1 of the paper), without auxiliary terms, and
the cross-entropy per pixel of semantic segmentation.

All are computed in float32, also under autocast: a softmax over a thousand classes loses accuracy in half precision.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from core.layers.precision import no_autocast


def soft_target_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """`-(1/B) sum_b sum_c target[b, c] * log softmax(logits[b])[c]`: the loss with mixup or cutmix targets.

    Args:
        logits: `(B, classes)`.
        target: `(B, classes)`, rows sum to 1 (label smoothing is already in them).

    Returns:
        A scalar in float32.

    Raises:
        ValueError: shapes differ.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and soft targets {tuple(target.shape)} must have one shape")
    with no_autocast(logits):
        return F.cross_entropy(logits.float(), target.float())


def label_smoothing_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with `smoothing / classes` of the mass on every class: the loss without mixup.

    Args:
        logits: `(B, classes)`.
        labels: `(B,)` int64.
        smoothing: share of the mass that is spread evenly, 0 for plain cross-entropy.

    Returns:
        A scalar in float32, the mean over the batch.
    """
    with no_autocast(logits):
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def classification_loss(logits: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    """The recipe's loss: soft targets `(B, classes)` as they are, integer labels `(B,)` with label smoothing."""
    if target.is_floating_point():
        return soft_target_cross_entropy(logits, target)
    return label_smoothing_cross_entropy(logits, target, smoothing)


#: Label of pixels that count neither in the loss nor in the evaluation.
IGNORE = 255


def segmentation_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not `IGNORE`; 0 where there are none.

    Args:
        scores: `(B, K, H, W)`.
        mask: `(B, H, W)` int64.

    Returns:
        A scalar in float32.
    """
    with no_autocast(scores):
        total = F.cross_entropy(scores.float(), mask, ignore_index=IGNORE, reduction="sum")
        return total / (mask != IGNORE).sum().clamp(min=1)
