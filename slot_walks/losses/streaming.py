"""The P-W-P cross-entropy over blocks of rows: nothing of size N x N is ever whole, nor kept for the backward pass.

With T = P Q, the gradient of `-sum S log(T + eps)` is closed: G = -S / (T + eps) gives dP = G Q^T and dQ = P^T G. Both
are small, so the forward pass computes them right away and the backward pass only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slot_walks.losses.targets import target_rows


def streamed_cross_entropy(
    to_slot: Tensor, to_part: Tensor, parts: Tensor, eps: float, block: int, *target: Any
) -> tuple[Tensor, Tensor]:
    """`-sum_{b,i,j} S[i,j] log((P Q)[i,j] + eps)` and the sum of the rows' entropies H(S).

    Args:
        to_slot: P, `(B, N, K)`.
        to_part: Q, `(B, K, N)`.
        parts: unit vectors `(B, N, C)`; they get no gradient.
        eps: inside the logarithm.
        block: rows at a time; memory grows with `B * block * N`.
        target: further arguments of `target_rows`, from `kind` on.

    Returns:
        Two scalars; gradients flow from the first to P and Q.
    """
    wanted = torch.is_grad_enabled() and (to_slot.requires_grad or to_part.requires_grad)
    return _Streamed.apply(to_slot, to_part, parts, eps, block, wanted, *target)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, to_slot: Tensor, to_part: Tensor, parts: Tensor, eps: float, block: int, wanted: bool, *target: Any
    ) -> tuple[Tensor, Tensor]:
        cross, entropy = to_slot.new_zeros(()), to_slot.new_zeros(())
        slot_blocks, part_gradient = [], torch.zeros_like(to_part) if wanted else None
        for start in range(0, parts.shape[1], block):
            stop = min(start + block, parts.shape[1])
            rows = target_rows(parts, start, stop, *target)
            entropy = entropy + torch.special.entr(rows).sum()
            leave = to_slot[:, start:stop]
            walk = torch.bmm(leave, to_part).add_(eps)
            cross = cross - walk.log().mul_(rows).sum()
            if wanted:
                gradient = rows.div_(walk).neg_()
                slot_blocks.append(torch.bmm(gradient, to_part.transpose(1, 2)))
                part_gradient = part_gradient + torch.bmm(leave.transpose(1, 2), gradient)
        if wanted:
            ctx.save_for_backward(torch.cat(slot_blocks, dim=1), part_gradient)
        ctx.mark_non_differentiable(entropy)
        return cross, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        slot_gradient, part_gradient = ctx.saved_tensors
        unused = (None,) * (len(ctx.needs_input_grad) - 2)
        return (slot_gradient * outer, part_gradient * outer, *unused)
