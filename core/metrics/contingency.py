"""Contingency tables of two labellings of the pixels, and every score that follows from them.

A table counts, for each image, the pixels that have label i in the truth and label j in the prediction. One `bincount`
makes the tables of a whole batch on its device; the adjusted Rand index, best overlaps, coverings and intersections
over unions are then a few operations on small arrays, where the field's scripts go through the picture once per label
or call a library per image. Scores are in float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

#: Keeps intersection over union defined where truth and prediction are both empty.
EPSILON = 1e-8
# Images counted at a time on a CPU: what belongs to them stays in the cache.
_CHUNK = 4


def contingency(
    target: Tensor,
    prediction: Tensor,
    num_targets: int | None = None,
    num_predictions: int | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Counts of label pairs.

    Args:
        target: true labels from 0 on, integer `(B, ...)`.
        prediction: predicted labels from 0 on, integer, of the same shape.
        num_targets: `I`; None: the largest label and one.
        num_predictions: `J`; None: likewise.
        valid: bool, of the same shape: pixels that are counted; the labels of others do not matter.

    Returns:
        `(B, I, J)` int64.

    Raises:
        ValueError: shapes differ, labels are no integers, negative, or too large.
    """
    shape = tuple(target.shape)
    if prediction.shape != target.shape or (valid is not None and valid.shape != target.shape):
        given = f"prediction {tuple(prediction.shape)}" + ("" if valid is None else f", valid {tuple(valid.shape)}")
        raise ValueError(f"target {shape} and {given} differ in shape: bring them to the same picture first")
    target, prediction = target.flatten(1), prediction.flatten(1)
    if valid is not None:
        valid = valid.flatten(1).to(target.device)
        target, prediction = target.where(valid, 0), prediction.where(valid, 0)
    rows = _count_labels(target, num_targets, "target")
    columns = _count_labels(prediction, num_predictions, "prediction")
    chunk = max(1, len(target) if target.is_cuda else _CHUNK)
    tables = [
        _tables(target[i : i + chunk], prediction[i : i + chunk], rows, columns, None if valid is None else valid[i:])
        for i in range(0, len(target), chunk)
    ]
    return torch.cat(tables) if tables else torch.zeros(0, rows, columns, dtype=torch.int64, device=target.device)


def _count_labels(labels: Tensor, number: int | None, name: str) -> int:
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} is {labels.dtype}: labels are integers (argmax of the masks)")
    if labels.numel() == 0:
        return number or 1
    least, largest = (int(v) for v in labels.aminmax()) if labels.dtype != torch.bool else (0, int(labels.any()))
    if least < 0 or (number is not None and largest >= number):
        bound = "" if number is None else f" to {number - 1}"
        raise ValueError(f"{name} has labels from {least} to {largest}, expected 0{bound}; mark others as not valid")
    return largest + 1 if number is None else number


def _tables(target: Tensor, prediction: Tensor, rows: int, columns: int, valid: Tensor | None) -> Tensor:
    images = len(target)
    cells = images * rows * columns
    # int32 halves the traffic wherever the cell numbers fit.
    kind = torch.int32 if cells < 2**31 - 1 else torch.int64
    index = target.to(kind, copy=True)
    index += torch.arange(0, images * rows, rows, device=target.device, dtype=kind)[:, None]
    index *= columns
    index += prediction.to(kind)
    if valid is not None:  # one more cell takes what is not counted, so that nothing has to be selected
        index.masked_fill_(~valid[:images], cells)
    return index.flatten().bincount(minlength=cells + 1)[:cells].view(images, rows, columns)


def without(table: Tensor, label: int = 0) -> Tensor:
    """The tables `(B, I, J)` over the pixels that do not have this true label."""
    kept = table.clone()
    kept[:, label : label + 1] = 0
    return kept


def adjusted_rand(table: Tensor) -> Tensor:
    """Adjusted Rand index, `(B,)`; 1 where nothing was counted.

    With `n_ij` a table and `a`, `b` its margins: (Σ C(n_ij,2) − E) / (½(Σ C(a_i,2) + Σ C(b_j,2)) − E) where
    E = Σ C(a_i,2) Σ C(b_j,2) / C(n,2). FG-ARI is that of `without(table)`.
    """
    both = _pairs(table).sum(dim=(1, 2))
    true, found = (_pairs(table.sum(dim=axis)).sum(dim=1) for axis in (2, 1))
    every = _pairs(table.sum(dim=(1, 2)))
    # The denominator vanishes only where both have one label each, or a label of its own for every pixel.
    trivial = (true == found) & ((true == 0) | (true == every))
    true, found = true.double(), found.double()
    expected = true * (found / every.clamp(min=1))
    denominator = ((true + found) / 2 - expected).masked_fill(trivial, 1.0)
    return ((both - expected) / denominator).masked_fill(trivial, 1.0)


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) // 2


def overlaps(table: Tensor) -> Tensor:
    """Intersection over union of every true with every predicted label, `(B, I, J)`; 0 where both are empty."""
    union = table.sum(dim=2, keepdim=True) + table.sum(dim=1, keepdim=True) - table
    return table.double() / union.clamp(min=1)


def present(table: Tensor, background: int | None = None) -> Tensor:
    """Which true labels have pixels, `(B, I)` bool; the background (where one is named) is left out."""
    found = table.sum(dim=2) > 0
    if background is not None:
        found[:, background : background + 1] = False
    return found


def covering(table: Tensor, background: int | None = None, weighted: bool = False) -> Tensor:
    """Mean over true labels of the best overlap with any predicted one, `(B,)`; 0 for an image without labels.

    Without the background this is the mean best overlap (mBO), with it the segmentation covering (mSC).

    Args:
        table: `(B, I, J)`.
        background: true label that is not covered; None: all are.
        weighted: weigh labels by their number of pixels (SC).
    """
    counted = present(table, background)
    weight = counted.double() * table.sum(dim=2) if weighted else counted.double()
    best = overlaps(table).amax(dim=2)
    return (best * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def recovered(table: Tensor, threshold: float = 0.5, background: int | None = 0) -> Tensor:
    """Share of the true labels whose best overlap exceeds the threshold, `(B,)`; 0 for an image without labels."""
    counted = present(table, background)
    found = (overlaps(table).amax(dim=2) > threshold) & counted
    return found.sum(dim=1).double() / counted.sum(dim=1).clamp(min=1)


def matched_overlap(table: Tensor, background: int | None = 0) -> Tensor:
    """Mean overlap of true labels with predicted ones under the best one-to-one matching, `(B,)`.

    Labels that find no partner count 0; so does an image without labels.
    """
    counted = present(table, background)
    scores = []
    for overlap, labels in zip(overlaps(table).cpu().numpy(), counted.cpu().numpy(), strict=True):
        overlap = overlap[labels]
        rows, columns = linear_sum_assignment(overlap, maximize=True)
        scores.append(overlap[rows, columns].sum() / max(len(overlap), 1))
    return torch.tensor(scores, dtype=torch.float64, device=table.device)


def foreground_overlap(table: Tensor, background: int = 0) -> tuple[Tensor, Tensor]:
    """IoU and Dice of every predicted label with all that is not background, `(B, J)` each."""
    true = without(table, background).sum(dim=(1, 2))[:, None]
    found = table.sum(dim=1)
    inside = without(table, background).sum(dim=1)
    iou = (inside + EPSILON) / (true + found - inside + EPSILON)
    dice = (2 * inside + EPSILON) / (true + found + EPSILON)
    return iou.double(), dice.double()


def pieces(table: Tensor, share: float, label: int | None = None) -> Tensor:
    """How many predicted labels have this share of an image's pixels, or of those of a true label, or more: `(B,)`."""
    counts = table.sum(dim=1) if label is None else table[:, label]
    return (counts >= share * counts.sum(dim=1, keepdim=True).clamp(min=1)).sum(dim=1).double()


def match_clusters(table: Tensor, how: Literal["auto", "hungarian", "majority"] = "auto") -> Tensor:
    """Class of every cluster, `(P,)` int64.

    Args:
        table: pixels of cluster p with class c, `(P, C)`, over a whole data set.
        how: `hungarian`: one to one, with the largest sum of IoU; `majority`: every cluster takes the class of its
            largest IoU (not the one with most pixels); `auto`: the former where there are as many clusters as classes.

    Raises:
        ValueError: one to one with another number of clusters than of classes, or another word.
    """
    clusters, classes = table.shape
    if how not in ("auto", "hungarian", "majority"):
        raise ValueError(f"match_clusters: how={how!r}; use auto, hungarian or majority")
    if how == "hungarian" and clusters != classes:
        raise ValueError(f"{clusters} clusters and {classes} classes cannot be matched one to one: use majority")
    scores = overlaps(table[None])[0]
    if how == "majority" or clusters != classes:
        return scores.argmax(dim=1)
    _, columns = linear_sum_assignment(scores.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns.astype(np.int64)).to(table.device)


def class_iou(table: Tensor, match: Tensor) -> Tensor:
    """IoU of every class `(C,)` after clusters have become classes; 0 for a class that occurs nowhere.

    Args:
        table: pixels of cluster p with class c, `(P, C)`.
        match: class of every cluster, `(P,)`; clusters of one class are merged.
    """
    merged = torch.zeros(table.shape[1], table.shape[1], dtype=table.dtype, device=table.device)
    merged.index_add_(0, match, table)
    hits = merged.diagonal()
    union = merged.sum(dim=0) + merged.sum(dim=1) - hits
    return hits.double() / union.clamp(min=1)
