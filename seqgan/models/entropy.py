"""Entropy terms that keep the whole codebook in use (section 3.4 of the paper; MaskGIT's for comparison)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

DISTANCES = ("l2_squared", "l2")
SIGNS = ("spread", "paper")
SCOPES = ("batch", "image")


def code_usage(distances: Tensor, scope: str = "batch") -> Tensor:
    """How much every code is used, softly: the mean over positions of softmax(-distance).

    Args:
        distances: of positions to codes, `(B, N, K)`.
        scope: `batch`: mean over all positions of all processes, `(1, K)`; `image`: per image, `(B, K)`.
    """
    return log_code_usage(distances, scope).exp()


def log_code_usage(distances: Tensor, scope: str = "batch") -> Tensor:
    """The logarithm of `code_usage`: finite, as are its gradients, where a share is too small for a float."""
    logs = (-distances).log_softmax(dim=-1)
    over = 1 if scope == "image" else (0, 1)
    # Against the largest, of all processes, so that one of the terms is 1 and no sum of them vanishes.
    largest = logs.detach().amax(dim=over, keepdim=True)
    if scope == "image":
        mean = (logs - largest).exp().mean(dim=over, keepdim=True)
    else:
        if _several():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        mean = _of_all_processes((logs - largest).exp().mean(dim=over, keepdim=True))
    return (mean.log() + largest)[:, 0]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_all_processes(mean: Tensor) -> Tensor:
    """The mean of the means of processes that hold equally many positions.

    The reduction hands gradients back, so that averaged gradients are those of the joint batch.
    """
    return all_reduce(mean) / dist.get_world_size() if _several() else mean


def entropy(shares: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, e.g. of a histogram; for a loss see `entropy_of_logs`.

    The slope at a share of zero is infinite.
    """
    return torch.special.entr(shares).sum(dim=-1)


def entropy_of_logs(logs: Tensor) -> Tensor:
    """`entropy` of shares that are given by their logarithms, with finite gradients however small a share is."""
    return -(logs.exp() * logs).sum(dim=-1)


class UsageEntropy(nn.Module):
    """The paper's term: the entropy H of the mean assignment, times `weight`.

    Args:
        weight: gamma.
        distance: `l2_squared` or `l2`; the paper says "L2 distance".
        sign: `spread`: minus gamma H, which makes usage even, the paper's aim; `paper`: plus gamma H as printed, which
            lets the codebook collapse.
        scope: over what assignments are averaged, see `code_usage`.
        temperature: divides distances.

    Raises:
        ValueError: an unknown distance, sign or scope, or a temperature that is not positive.
    """

    def __init__(
        self,
        weight: float = 0.01,
        distance: str = "l2_squared",
        sign: str = "spread",
        scope: str = "batch",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("distance", distance, DISTANCES),
            ("sign", sign, SIGNS),
            ("scope", scope, SCOPES),
        ):
            if value not in known:
                raise ValueError(f"UsageEntropy: unknown {name} {value!r}: use {', '.join(known)}")
        if temperature <= 0:
            raise ValueError(f"UsageEntropy: the temperature must be positive, not {temperature}")
        self.weight, self.distance, self.sign, self.scope = weight, distance, sign, scope
        self.temperature = temperature

    def forward(self, squared: Tensor) -> Tensor:
        """The term, weighted and signed, from squared distances `(B, N, K)`."""
        value = entropy_of_logs(log_code_usage(self.distances(squared), self.scope)).mean()
        return (self.weight if self.sign == "paper" else -self.weight) * value

    def distances(self, squared: Tensor) -> Tensor:
        """The distances over temperature that codes are assigned by, from squared distances of any shape."""
        if self.distance == "l2":
            # The root has no gradient at zero, where a feature meets its code.
            squared = squared.clamp_min(1e-12).sqrt()
        return squared / self.temperature


class MaskGITEntropy(nn.Module):
    """MaskGIT's term: every position sure of its code, all positions together of none.

        weight * (mean over positions of H(softmax(-D / temperature)) - H(mean over positions))

    Positions are those of all processes.

    Args:
        weight: 0.1 as released.
        temperature: divides distances.
        assignment: `softmax`, or `argmax`: hard, with the gradient of the softmax.

    Raises:
        ValueError: an unknown assignment, or a temperature that is not positive.
    """

    def __init__(self, weight: float = 0.1, temperature: float = 0.01, assignment: str = "softmax") -> None:
        super().__init__()
        if assignment not in ("softmax", "argmax"):
            raise ValueError(f"unknown assignment {assignment!r}: use softmax or argmax")
        if temperature <= 0:
            raise ValueError(f"MaskGITEntropy: the temperature must be positive, not {temperature}")
        self.weight, self.temperature, self.assignment = weight, temperature, assignment

    def forward(self, squared: Tensor) -> Tensor:
        """The weighted term from squared distances `(B, N, K)`."""
        scores = -squared.flatten(0, -2) / self.temperature
        log_shares = scores.log_softmax(dim=-1)
        shares = log_shares.exp()
        if self.assignment == "argmax":
            hard = torch.zeros_like(shares).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
            shares = hard.detach() + (shares - shares.detach())
        mean = _of_all_processes(shares.mean(dim=0))
        sure = -(shares * log_shares).sum(dim=-1).mean()
        return self.weight * (sure + (mean * (mean + 1e-5).log()).sum())
