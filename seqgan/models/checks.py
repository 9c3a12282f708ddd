"""What networks are given, checked before an index reads a row that is not meant for it or a shape is cut silently."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        ValueError: labels are missing although there are several classes, are not B integers, or lie outside of the
            classes. Labels on a GPU are not waited for: there, those outside stop the process as an index outside of a
            table does.
    """
    if label is None:
        if num_classes > 1:
            raise ValueError(f"the model knows {num_classes} classes: give a label for every image")
        return torch.zeros(batch, dtype=torch.long, device=device)
    if _recorded(label):
        return label
    if label.shape != (batch,) or label.dtype not in _INTEGERS:
        raise ValueError(f"labels are {_described(label)}: give one integer for each of {batch} images, ({batch},)")
    inside = (label >= 0) & (label < num_classes)
    none = ""
    if null_label is not None:
        inside, none = inside | (label == null_label), f", and {null_label} for 'no class'"
    _require(label, inside, "label", f"the model knows 0 to {num_classes - 1}{none}")
    return label


def check_codes(codes: Tensor, size: int, dims: tuple[int, ...] = (2,), read: Tensor | None = None) -> None:
    """Holds codes against the codebook that they are read from.

    Args:
        codes: integers.
        size: codes that there are.
        dims: numbers of dimensions that are right.
        read: True where a code is read at all, of their shape; None: everywhere.

    Raises:
        ValueError: no integers, another number of dimensions, or a code outside of 0 to size - 1; on a GPU see
            `class_labels`.
    """
    if _recorded(codes):
        return
    if codes.ndim not in dims or codes.dtype not in _INTEGERS:
        wanted = " or ".join({2: "(B, N)", 3: "(B, h, w)"}[count] for count in dims)
        raise ValueError(f"codes are {_described(codes)}: give integers {wanted}")
    inside = (codes >= 0) & (codes < size)
    _require(codes, inside if read is None else inside | ~read, "code", f"there are 0 to {size - 1}")


def check_mask(mask: Tensor, codes: Tensor, name: str = "mask") -> None:
    """Holds a mask against the codes that it is for.

    Raises:
        ValueError: another shape, or not of truth values.
    """
    if not _recorded(mask) and (mask.shape != codes.shape or mask.dtype != torch.bool):
        raise ValueError(f"{name} is {_described(mask)}: give truth values of the codes' shape {tuple(codes.shape)}")


def check_image(image: Tensor, channels: int, factor: int) -> None:
    """Holds images `(B, C, H, W)` against an encoder.

    Args:
        image: what it is given.
        channels: that it takes.
        factor: by which it divides the sides.

    Raises:
        ValueError: another number of dimensions or channels, or sides that the factor does not divide.
    """
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"images are {_described(image)}: give floats (B, {channels}, H, W) in [-1, 1]")
    if image.shape[-1] % factor or image.shape[-2] % factor:
        raise ValueError(f"images of {tuple(image.shape[-2:])} pixels: the sides must be multiples of {factor}")


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _recorded(value: Tensor) -> bool:
    """Neither a graph that is being recorded nor the meta device has values to look at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or value.is_meta


def _require(values: Tensor, inside: Tensor, name: str, known: str) -> None:
    if values.device.type != "cpu":
        torch._assert_async(inside.all(), f"a {name} lies outside: {known}")
    elif not inside.all():
        place = tuple((~inside).nonzero()[0].tolist())
        raise ValueError(f"{name} {values[place].item()}: {known} (place {list(place)})")
