"""Slot attention: slots compete for tokens and are updated by a recurrent cell, a few times over."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

TRUNCATIONS = ("none", "fixed_point", "bi_level")


class SlotAttentionOutput(NamedTuple):
    """What slot attention gives.

    slots: `(B, K, D)`.
    attention: of the last iteration, normalised over tokens, mean of the heads: `(B, K, N)`, rows sum to one.
    assignment: the same before that normalisation, sum of the heads: `(B, N, K)`, rows sum to one.
    """

    slots: Tensor
    attention: Tensor
    assignment: Tensor


class RecurrentCell(nn.GRUCell):
    """torch's GRU cell, in two matrix products and in the state's precision also under autocast."""

    def forward(self, update: Tensor, state: Tensor) -> Tensor:
        """The next state of `state` `(..., D)` after reading `update` `(..., D)`."""
        read = F.linear(update, self.weight_ih, self.bias_ih).chunk(3, dim=-1)
        kept = F.linear(state, self.weight_hh, self.bias_hh).chunk(3, dim=-1)
        reset, gate = (read[0] + kept[0]).sigmoid(), (read[1] + kept[1]).sigmoid()
        candidate = (read[2] + reset * kept[2]).tanh()
        return candidate + gate * (state - candidate)


class SlotAttention(nn.Module):
    """Slot attention as the paper uses it.

    Per iteration: every token spreads one softmax over all heads and slots; every slot takes the mean of the tokens'
    values, weighted by what it got; a GRU and an MLP update it. Keys and values come from one product, once per call.

    Args:
        dim: channels D of a slot.
        in_dim: channels of a token; None: D.
        num_iterations: T.
        num_heads: heads, which compete in the same softmax.
        mlp_hidden: width of the MLP; None: D.
        truncate: where gradients stop before the last iteration. `none`: nowhere; `fixed_point`: at the slots, so that
            their start gets no gradient; `bi_level` (BO-QSA): at the slots, with a straight way through to their start.
        eps: added to the attention before it is normalised over tokens.

    Raises:
        ValueError: D is not divisible by the heads, no iterations, or an unknown truncation.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int | None = None,
        num_iterations: int = 3,
        num_heads: int = 1,
        mlp_hidden: int | None = None,
        truncate: str = "none",
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"slots of {dim} channels cannot be split into {num_heads} heads of equal size")
        if truncate not in TRUNCATIONS:
            raise ValueError(f"unknown truncation {truncate!r}: use {', '.join(TRUNCATIONS)}")
        if num_iterations < 1:
            raise ValueError(f"slot attention needs at least one iteration, not {num_iterations}")
        in_dim = dim if in_dim is None else in_dim
        hidden = dim if mlp_hidden is None else mlp_hidden
        self.dim, self.num_iterations, self.num_heads = dim, num_iterations, num_heads
        self.truncate, self.eps = truncate, eps
        self.norm_inputs = nn.LayerNorm(in_dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(in_dim, 2 * dim, bias=False)
        self.gru = RecurrentCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As released: Xavier for linear layers, Kaiming before the ReLU, orthogonal recurrence; biases zero."""
        for weight in (self.to_q.weight, *self.to_kv.weight.chunk(2), self.mlp[2].weight, self.gru.weight_ih):
            nn.init.xavier_uniform_(weight)
        nn.init.kaiming_uniform_(self.mlp[0].weight, nonlinearity="relu")
        nn.init.orthogonal_(self.gru.weight_hh)
        for bias in (self.mlp[0].bias, self.mlp[2].bias, self.gru.bias_ih, self.gru.bias_hh):
            nn.init.zeros_(bias)

    def forward(self, inputs: Tensor, slots: Tensor) -> SlotAttentionOutput:
        """Slots `(B, K, D)` after T iterations on the tokens `inputs` `(B, N, in_dim)`; any K."""
        keys, values = rearrange(
            self.to_kv(self.norm_inputs(inputs)), "b n (two h d) -> two b h n d", two=2, h=self.num_heads
        )
        keys = keys * (self.dim // self.num_heads) ** -0.5
        start = slots
        for iteration in range(self.num_iterations):
            if iteration == self.num_iterations - 1:
                slots = self._truncated(slots, start)
            queries = rearrange(self.to_q(self.norm_slots(slots)), "b k (h d) -> b h k d", h=self.num_heads)
            shares = _compete(queries @ keys.transpose(-2, -1))
            weights = shares + self.eps
            weights = weights / weights.sum(dim=-1, keepdim=True)
            update = rearrange(weights.to(values.dtype) @ values, "b h k d -> b k (h d)")
            slots = self.gru(update, slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return SlotAttentionOutput(slots, weights.mean(dim=1), shares.sum(dim=1).transpose(1, 2))

    def _truncated(self, slots: Tensor, start: Tensor) -> Tensor:
        if self.truncate == "none":
            return slots
        if self.truncate == "fixed_point":
            return slots.detach()
        return slots.detach() + start - start.detach()


def _compete(logits: Tensor) -> Tensor:
    """Softmax over heads and slots together, for every token: `(B, H, K, N)`."""
    heads = logits.shape[1]
    shares = rearrange(logits, "b h k n -> b (h k) n").softmax(dim=1)
    return rearrange(shares, "b (h k) n -> b h k n", h=heads)
