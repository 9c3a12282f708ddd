"""The classes that both transformers are given, checked before they are looked up in a table that codes share."""

from __future__ import annotations

import torch
from torch import Tensor


def class_labels(
    label: Tensor | None, num_classes: int, null_label: int | None, batch: int, device: torch.device
) -> Tensor:
    """The class of every image `(B,)`.

    Args:
        label: classes `(B,)`; None: all images are of class 0, if there is no other.
        num_classes: that the model knows.
        null_label: the label of "no class"; None: the model has none.
        batch: B.
        device: of the labels that are made here.

    Raises:
        ValueError: labels are missing although there are several classes, or lie outside of them. Labels on a GPU are
            not waited for: there, those outside stop the process as an index outside of a table does.
    """
    if label is None:
        if num_classes > 1:
            raise ValueError(f"the model knows {num_classes} classes: give a label for every image")
        return torch.zeros(batch, dtype=torch.long, device=device)
    # Neither a graph that is being recorded nor the meta device has values to look at.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or label.is_meta:
        return label
    inside = (label >= 0) & (label < num_classes)
    if null_label is not None:
        inside = inside | (label == null_label)
    if label.device.type == "cpu":
        if not inside.all():
            none = "" if null_label is None else f", and {null_label} for 'no class'"
            raise ValueError(f"label {label[~inside][0].item()}: the model knows 0 to {num_classes - 1}{none}")
    else:
        torch._assert_async(inside.all(), f"a label lies outside of 0 to {num_classes - 1}")
    return label
