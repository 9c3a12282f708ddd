"""The few compiled operators of mmcv that mmdet's two-stage and dense detectors call, on torchvision's kernels.

mmdet imports ``mmcv._ext``, a compiled module that only the heavy build of mmcv has: half an hour of compilation that
breaks with every new PyTorch. ``mmcv-lite`` is the same package without it. Importing this module, before mmdet, puts a
stand-in in its place (nothing happens where the compiled one is installed); CPU and CUDA, forward and backward:

    nms                          Mask R-CNN, Cascade R-CNN, RetinaNet, RPN: `torchvision.ops.nms`
    roi_align_forward/_backward  RoI heads: `torchvision.ops.roi_align` (average pooling)
    sigmoid_focal_loss_*         RetinaNet on CUDA (mmdet has its own formula for the CPU)

Everything else (deformable convolutions, rotated boxes, soft NMS, ...) raises `MissingOperator` when it is called and
not before, so that mmdet can be imported as a whole. FPN, Swin and the heads need no compiled operator.

In a config for mmdet's own tools, without this project's launcher:
``custom_imports = dict(imports=["core.config.mmcv_ops", ...])``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor

from core.errors import VitrineError


class MissingOperator(VitrineError, NotImplementedError):
    """An operator of compiled mmcv that has no counterpart here."""


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes that greedy non-maximum suppression keeps, best first: int64 (K,).

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box goes when its overlap with a better one is above it.
        offset: 1 counts pixels, so that a box from x1 to x2 is x2 - x1 + 1 wide (mmdet 1.x); 0 measures.
    """
    boxes = boxes.float()
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores.float(), iou_threshold)


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `output` (K, C, aligned_height, aligned_width) with averages of `features` (B, C, H, W) in bins of `rois`.

    Args:
        features: of any floating type; sampling is done in float32.
        rois: (K, 5): number of the image, x1, y1, x2, y2 in the image's pixels.
        output: written in place.
        argmax_y, argmax_x: of max pooling; not used.
        aligned_height, aligned_width: bins.
        spatial_scale: pixels of the features per pixel of the image.
        sampling_ratio: samples per bin and side; 0: as many as the bin is wide.
        pool_mode: 1 for averages.
        aligned: pixel centres at half integers.

    Raises:
        MissingOperator: max pooling.
    """
    if pool_mode != 1:
        raise MissingOperator("RoIAlign(pool_mode='max') is not available without compiled mmcv: use pool_mode='avg'")
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(features.float(), rois.float(), size, spatial_scale, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `grad_input` (B, C, H, W) with the gradient of the features; arguments as in `roi_align_forward`."""
    size = (aligned_height, aligned_width)
    if grad_input.is_cuda and torch.are_deterministic_algorithms_enabled():
        # torchvision has a slower implementation without atomic additions, which only its autograd knows. The
        # operator is linear in the features, so any will do.
        with torch.enable_grad():
            features = torch.zeros_like(grad_input, dtype=torch.float32, requires_grad=True)
            pooled = torchvision.ops.roi_align(features, rois.float(), size, spatial_scale, sampling_ratio, aligned)
        grad_input.copy_(torch.autograd.grad(pooled, features, grad_output.float())[0])
        return
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output.float().contiguous(),
            rois.float(),
            spatial_scale,
            *size,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Fills `output` (N, C) with the focal loss of every class.

    Args:
        logits: (N, C).
        target: int64 (N,): class, or C for the background.
        weight: (C,) factors by the sample's class, or empty.
        output: written in place.
        gamma, alpha: of the focal loss.
    """
    x, positive, factor = _focal_parts(logits, target, weight, alpha)
    p = x.sigmoid()
    log_p, log_q = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    output.copy_(-factor * torch.where(positive, (1 - p) ** gamma * log_p, p**gamma * log_q))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Fills `grad_input` (N, C) with the derivative of each loss by its logit; arguments as in the forward pass."""
    x, positive, factor = _focal_parts(logits, target, weight, alpha)
    p = x.sigmoid()
    log_p, log_q = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    rising = (1 - p) ** gamma * (1 - p - gamma * p * log_p)
    falling = p**gamma * (gamma * (1 - p) * log_q - p)
    grad_input.copy_(-factor * torch.where(positive, rising, falling))


def _focal_parts(logits: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float32, where the target is (N, C), and the factor of each term (N, C)."""
    x = logits.float()
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    factor = torch.where(positive, alpha, 1 - alpha)
    if weight.numel():
        # The background has no weight of its own: it counts fully.
        factor = factor * torch.cat([weight.float(), weight.new_ones(1, dtype=torch.float32)])[target][:, None]
    return x, positive, factor


OPERATORS: dict[str, Callable[..., Any]] = {
    operator.__name__: operator
    for operator in (
        nms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
    )
}


class _Extension(ModuleType):
    """``mmcv._ext``: every name exists, because mmcv checks that at import; most only say that they are missing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return OPERATORS.get(name) or _missing(name)


def _missing(name: str) -> Callable[..., NoReturn]:
    def operator(*arguments: Any, **options: Any) -> NoReturn:
        raise MissingOperator(
            f"mmcv's operator '{name}' is not available without compiled mmcv. core.config.mmcv_ops offers "
            f"{', '.join(OPERATORS)}: choose a model that needs no other, or install the full mmcv"
        )

    operator.__name__ = name
    return operator


def register() -> None:
    """Puts the stand-in where mmcv looks for its compiled operators, unless they are there."""
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        extension = _Extension("mmcv._ext", __doc__)
        extension.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", loader=None)  # mmengine looks for it
        sys.modules["mmcv._ext"] = extension


register()
