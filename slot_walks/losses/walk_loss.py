"""Losses of cyclic walks (section 3 of the paper), and the reconstruction loss of the decoders that they replace.

A walker that leaves a slot must come back to it (W-P-W); a walker that leaves a part must come back to it or to a part
whose feature resembles it (P-W-P). All is computed in float32, also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.precision import full_precision, no_autocast
from slot_walks.losses.streaming import streamed_cross_entropy
from slot_walks.losses.targets import KINDS, POSITIONS, target_rows, unit_places
from slot_walks.losses.walks import transitions_between, unit

REDUCTIONS = ("elements", "rows")
IMPLEMENTATIONS = ("stream", "plain")


class WalkLoss(nn.Module):
    """`alpha * wpw + beta * pwp`, without parameters.

        wpw = -mean log(diag(Q P) + eps)                      pwp = -mean S log(P Q + eps)

    Args:
        alpha: weight of the walk whole-part-whole.
        beta: weight of the walk part-whole-part; with 0 it is not computed.
        temperature: of both transitions.
        threshold: cosine similarity from which on two parts belong together (target `thresholded`).
        target: see `slot_walks.losses.targets.target_rows`: thresholded, identity, dense, topk, attention.
        target_temperature: of the target; None: as `temperature`.
        target_position: none, average (MOVi) or product.
        topk_ratio: share of the parts kept by target `topk`.
        reduction: `elements`: mean over all entries of the matrices, as published, which weighs a row's cross-entropy
            by 1/K and 1/N; `rows`: mean over rows, so that the balance does not depend on K and the resolution. Weights
            alpha/K and beta/N of a reference size then give the same loss at that size.
        eps: inside the logarithms.
        impl: `stream`: over blocks of rows, nothing of size N x N in memory; `plain`: the reference.
        block: rows at a time.

    Raises:
        ValueError: an unknown target, position, reduction or implementation.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 100.0,
        temperature: float = 0.1,
        threshold: float = 0.7,
        target: str = "thresholded",
        target_temperature: float | None = None,
        target_position: str = "none",
        topk_ratio: float = 0.5,
        reduction: str = "elements",
        eps: float = 1e-4,
        impl: str = "stream",
        block: int = 128,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("target", target, KINDS),
            ("target_position", target_position, POSITIONS),
            ("reduction", reduction, REDUCTIONS),
            ("impl", impl, IMPLEMENTATIONS),
        ):
            if value not in known:
                raise ValueError(f"WalkLoss: unknown {name} {value!r}: use {', '.join(known)}")
        if temperature <= 0 or block < 1:
            raise ValueError(f"WalkLoss: temperature {temperature} and block {block} must be positive")
        self.alpha, self.beta, self.temperature, self.threshold = alpha, beta, temperature, threshold
        self.target, self.target_position, self.topk_ratio = target, target_position, topk_ratio
        self.target_temperature = temperature if target_temperature is None else target_temperature
        self.reduction, self.eps, self.impl, self.block = reduction, eps, impl, block

    def extra_repr(self) -> str:
        """Weights and target, for printing."""
        return f"alpha={self.alpha}, beta={self.beta}, target={self.target}, position={self.target_position}"

    def forward(
        self,
        features: Tensor,
        slots: Tensor,
        grid: tuple[int, int] | None = None,
        assignment: Tensor | None = None,
        attention: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms.

        Args:
            features: of the parts `(B, N, C)`; they get no gradient.
            slots: `(B, K, C)`.
            grid: `(h, w)`, for a `target_position`.
            assignment: parts over slots in the slot attention `(B, N, K)`, for target `attention`.
            attention: slots over parts there `(B, K, N)`, likewise.

        Returns:
            Scalars `loss`, `wpw`, `pwp` (unweighted) and `pwp_kl`, the mean row cross-entropy of P-W-P less the entropy
            of its target (its lower bound up to -log(1 + N eps); no gradient), and the transition `to_slot` P
            `(B, N, K)`. `pwp` and `pwp_kl` are absent when beta is 0.

        Raises:
            ValueError: the target needs a grid or the slot attention, and it is not given.
        """
        with no_autocast(features):
            parts = unit(features.detach())
            to_slot, to_part = transitions_between(parts, unit(slots), self.temperature)
            wpw = self.whole_part_whole(to_slot, to_part)
            if self.beta == 0:
                return {"loss": self.alpha * wpw, "wpw": wpw, "to_slot": to_slot}
            cross, entropy = self.cross_entropy(to_slot, to_part, parts, grid, assignment, attention)
            rows = parts.shape[0] * parts.shape[1]
            pwp = cross / rows if self.reduction == "rows" else cross / (rows * parts.shape[1])
            kl = (cross.detach() - entropy) / rows
            loss = self.alpha * wpw + self.beta * pwp
            return {"loss": loss, "wpw": wpw, "pwp": pwp, "pwp_kl": kl, "to_slot": to_slot}

    def whole_part_whole(self, to_slot: Tensor, to_part: Tensor) -> Tensor:
        """The W-P-W term. It reads the diagonal of Q P alone, so the product is never formed."""
        stay = (to_part * to_slot.transpose(1, 2)).sum(dim=2)  # (B, K)
        row = -(stay + self.eps).log().mean()
        return row if self.reduction == "rows" else row / stay.shape[1]

    def cross_entropy(
        self,
        to_slot: Tensor,
        to_part: Tensor,
        parts: Tensor,
        grid: tuple[int, int] | None = None,
        assignment: Tensor | None = None,
        attention: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`-sum S log(P Q + eps)` over the whole batch, and the sum of the entropies of S's rows."""
        if self.impl == "stream" and self.target == "identity" and self.target_position == "none":
            stay = (to_slot * to_part.transpose(1, 2)).sum(dim=2)  # the diagonal of P Q
            return -(stay + self.eps).log().sum(), stay.new_zeros(())
        target = self._target(parts, grid, assignment, attention)
        if self.impl == "stream":
            return streamed_cross_entropy(to_slot, to_part, parts, self.eps, self.block, *target)
        rows = target_rows(parts, 0, parts.shape[1], *target)
        return -(rows * (to_slot @ to_part + self.eps).log()).sum(), torch.special.entr(rows).sum()

    def row_weights(self, slots: int, parts: int) -> tuple[float, float]:
        """What the cross-entropy of one row weighs in the loss: a slot's in W-P-W, a part's in P-W-P."""
        if self.reduction == "rows":
            return self.alpha, self.beta
        return self.alpha / slots, self.beta / parts

    def gradient_cosine(self, output: Any, parameters: Sequence[nn.Parameter], grid: tuple[int, int]) -> Tensor:
        """Cosine of the two walks' gradients: at 1 they agree, below 0 they oppose each other.

        Args:
            output: the network's, of a forward pass with gradients (`slot_walks.models.WalkerOutput`).
            parameters: those whose gradients are compared, as one vector.
            grid: `(h, w)` of the parts.

        Returns:
            A scalar; it does not depend on alpha and beta, which may be 0.
        """
        with no_autocast(output.features):
            parts = unit(output.features.detach())
            to_slot, to_part = transitions_between(parts, unit(output.whole), self.temperature)
            cross, _ = self.cross_entropy(to_slot, to_part, parts, grid, output.assignment, output.attention)
            terms = (self.whole_part_whole(to_slot, to_part), cross)
            vectors = []
            for term in terms:
                found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
                vectors.append(torch.cat([gradient.flatten() for gradient in found]))
        return F.cosine_similarity(*vectors, dim=0)

    def rows_of_target(
        self,
        features: Tensor,
        start: int,
        stop: int,
        grid: tuple[int, int] | None = None,
        assignment: Tensor | None = None,
        attention: Tensor | None = None,
    ) -> Tensor:
        """Rows `start` to `stop` of the P-W-P target of features `(B, N, C)`, `(B, stop - start, N)`, to look at.

        Other arguments and errors as in `forward`.
        """
        with no_autocast(features):
            parts = unit(features.detach())
            return target_rows(parts, start, stop, *self._target(parts, grid, assignment, attention))

    def _target(
        self, parts: Tensor, grid: tuple[int, int] | None, assignment: Tensor | None, attention: Tensor | None
    ) -> tuple[object, ...]:
        """Arguments of `target_rows` from `kind` on."""
        if self.target != "attention":
            assignment = attention = None
        elif assignment is None or attention is None:
            raise ValueError("WalkLoss: target 'attention' needs the slot attention's assignment and attention")
        else:
            assignment, attention = assignment.detach(), attention.detach()
        places = None if self.target_position == "none" else unit_places(parts, grid)
        kind = (self.target, self.threshold, self.target_temperature, self.topk_ratio, self.target_position)
        return (*kind, places, assignment, attention)


def reconstruction_loss(reconstruction: Tensor, features: Tensor) -> Tensor:
    """Mean squared error over all elements of `(B, N, C)`, in float32; the features, its target, get no gradient."""
    with no_autocast(reconstruction):
        return F.mse_loss(full_precision(reconstruction), full_precision(features.detach()))
