"""Where slots start: a shared Gaussian (as released), free vectors (BO-QSA), or the Gaussian's mean with offsets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("gaussian", "learned", "gaussian_mean")


class SlotInit(nn.Module):
    """Initial slots: `S0 = mu + exp(log_sigma) * noise` for the released model.

    Args:
        num_slots: K.
        dim: channels D of a slot.
        kind: `gaussian`: one mean and deviation for all slots, sampled also in evaluation; `learned`: K free vectors,
            no sampling; `gaussian_mean`: the mean plus a learned offset per slot, no sampling.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, num_slots: int, dim: int, kind: str = "gaussian") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown slot init {kind!r}: use {', '.join(KINDS)}")
        self.num_slots, self.dim, self.kind = num_slots, dim, kind
        if kind != "learned":
            self.mu = nn.Parameter(torch.empty(1, 1, dim))
        if kind == "gaussian":
            self.log_sigma = nn.Parameter(torch.empty(1, 1, dim))
        else:
            self.slots = nn.Parameter(torch.empty(num_slots, dim))  # with `gaussian_mean`, offsets from the mean
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def extra_repr(self) -> str:
        """Kind and sizes, for printing."""
        return f"{self.num_slots}, {self.dim}, kind={self.kind!r}"

    @property
    def samples(self) -> bool:
        """Whether the start depends on noise."""
        return self.kind == "gaussian"

    def forward(
        self, batch: int, num_slots: int | None = None, noise: Tensor | torch.Generator | None = None
    ) -> Tensor:
        """Initial slots `(B, K, D)`.

        Args:
            batch: B.
            num_slots: K, if not the one of the constructor.
            noise: standard normal `(B, K, D)`, or the generator that it is drawn from (on the generator's device);
                None: torch's global generator. Read by kind `gaussian` only.

        Raises:
            ValueError: noise of another shape, or more slots than there are free vectors.
        """
        count = self.num_slots if num_slots is None else num_slots
        if not self.samples:
            if count > self.num_slots:
                raise ValueError(
                    f"slot init {self.kind!r} has {self.num_slots} vectors, {count} slots were asked for: build it "
                    "with more, or use 'gaussian'"
                )
            slots = self.slots[:count] if self.kind == "learned" else self.mu[0] + self.slots[:count]
            return slots.expand(batch, -1, -1)
        shape = (batch, count, self.dim)
        if noise is None:
            noise = torch.randn(shape, device=self.mu.device, dtype=self.mu.dtype)
        elif not isinstance(noise, Tensor):
            noise = torch.randn(shape, generator=noise, device=noise.device, dtype=self.mu.dtype)
        elif noise.shape != shape:
            raise ValueError(f"slot noise has shape {tuple(noise.shape)}, wanted {shape}")
        return self.mu + self.log_sigma.exp() * noise.to(self.mu.device, self.mu.dtype)
