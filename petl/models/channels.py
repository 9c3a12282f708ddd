"""The paper's idea: which channels matter to a task, and a small linear layer that tunes these alone.

1. Align the network to the task's images: train the scales and shifts of its LayerNorms (`petl.LNTune`).
2. Ask of every channel at a site what its removal would cost, to first order (`channel_products`, `ScoreSum`), and keep
   the K channels that cost most in every block (`select_channels`).
3. Tune these: ``y[S] = x[S] + s (W x[S] + b)`` with one K x K matrix a block (`ChannelTuning`).

Sections 2.2 to 2.4 of the specification; the paper is arXiv 2303.07910. Everything here is a function of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.models.sites import OnOutput, OnStream

REDUCTIONS = ("abs_of_sum", "sum_of_abs", "squared", "signed")


# ------------------------------------------------------------------ which channels
def channel_products(features: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """What every channel contributes to the loss, image by image, to first order.

    Args:
        features: h `(B, ..., C)` at a site.
        gradients: of the summed loss with respect to h, `(B, ..., C)`.

    Returns:
        ``a = sum_n g h`` and ``sum_n |g h|``, each `(B, C)` in float64. The loss without channel c differs from
        the loss by about ``-a[:, c]``.
    """
    product = (features.detach().double() * gradients.double()).flatten(1, -2)
    return product.sum(1), product.abs().sum(1)


class ScoreSum:
    """Scores of one site over any number of batches, in all four reductions.

    The sums run over images, so that the scores do not depend on how images are batched.
    """

    def __init__(self) -> None:
        self.images = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, signed: Tensor, absolute: Tensor) -> None:
        """The products of one batch, as `channel_products` gives them."""
        terms = {
            "abs_of_sum": signed.abs(),
            "sum_of_abs": absolute,
            "squared": signed.square(),
            "signed": signed,
        }
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.sum(0)
        self.images += len(signed)

    def score(self, reduction: str) -> Tensor:
        """T `(C,)` in float64, the mean over images.

        Raises:
            ValueError: an unknown reduction, or nothing was added.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction '{reduction}' is none of {list(REDUCTIONS)}")
        if not self.images:
            raise ValueError("no image was scored")
        mean = self.sums[reduction] / self.images
        return mean.abs() if reduction == "signed" else mean


def select_channels(
    scores: Sequence[Tensor], k: int | float, *, allocation: str = "per_layer", smallest: bool = False
) -> list[Tensor]:
    """The channels that are tuned, of every block, ascending.

    Args:
        scores: T_l `(C_l,)` of every block.
        k: channels of a block, or as a fraction below 1 their share (networks whose blocks differ in width).
        allocation: `per_layer`, the k best of every block; `global`, the ``k L`` best of all blocks after every block's
            scores were divided by their L2 norm; a block may get none.
        smallest: the k worst instead.

    Returns:
        Indices (int64) of every block; of equal scores the lower index is taken.

    Raises:
        ValueError: an unknown allocation; more channels than there are; scores that are not finite.
    """
    if allocation not in ("per_layer", "global"):
        raise ValueError(f"allocation '{allocation}' is neither per_layer nor global")
    counts = [round(k * len(score)) if 0 < k < 1 else int(k) for score in scores]
    for index, (score, count) in enumerate(zip(scores, counts, strict=True)):
        if not torch.isfinite(score).all():
            raise ValueError(f"scores of block {index} are not finite")
        if not 0 < count <= len(score):
            raise ValueError(f"k={k}: block {index} has {len(score)} channels")
    if allocation == "per_layer":
        return [_best(score, count, smallest) for score, count in zip(scores, counts, strict=True)]
    joint = torch.cat([score / score.norm().clamp_min(torch.finfo(score.dtype).tiny) for score in scores])
    mask = torch.zeros(len(joint), dtype=torch.bool)
    mask[_best(joint, sum(counts), smallest)] = True
    return [part.nonzero().flatten() for part in mask.split([len(score) for score in scores])]


def _best(score: Tensor, count: int, smallest: bool) -> Tensor:
    order = torch.sort(score.cpu(), descending=not smallest, stable=True).indices
    return order[:count].sort().values


# ------------------------------------------------------------------ how they are tuned
class ChannelTuning(nn.Module):
    """``y[S] = x[S] + s f(x[S])`` on the channels S; all others stay.

    Args:
        channels: S, ascending; the module may have none (`global` allocation) and is then the identity.
        dim: channels of the input.
        scale: s.
        scale_on: what s multiplies: `module`, ``x + s f(x)``, or `input`, ``s x + f(x)`` (SCT's Swin).
        form: of f: `linear` (W x + b), `diagonal`, `lowrank`, `mlp` (two layers with GELU between).
        rank: hidden width of `lowrank` and `mlp`.
        init: `trunc`, a truncated normal of deviation 0.02 (SCT; not the identity at first), or `zero`.
        axis: of the channels in the input.

    Raises:
        ValueError: channels out of range or not ascending; an unknown form, init or scale_on.
    """

    def __init__(
        self,
        channels: Sequence[int] | Tensor,
        dim: int,
        *,
        scale: float = 1.0,
        scale_on: str = "module",
        form: str = "linear",
        rank: int = 8,
        init: str = "trunc",
        axis: int = -1,
    ) -> None:
        super().__init__()
        index = [int(channel) for channel in channels]  # checked as numbers: on the meta device there are none
        if index != sorted(set(index)) or any(not 0 <= channel < dim for channel in index):
            raise ValueError(f"channels of {dim} have to be distinct, ascending and within it: {index}")
        for value, known in ((form, _FORMS), (init, ("trunc", "zero")), (scale_on, ("module", "input"))):
            if value not in known:
                raise ValueError(f"'{value}' is none of {list(known)}")
        self.dim, self.scale, self.scale_on, self.form, self.axis = dim, scale, scale_on, form, axis
        self.register_buffer("channels", torch.tensor(index, dtype=torch.long))
        self.update = _FORMS[form](len(index), rank) if len(index) else nn.Identity()
        self.reset_parameters(init)

    def reset_parameters(self, init: str) -> None:
        """See the class; of two factors only the second is zero, so that both are trained."""
        layers = [m for m in self.update.modules() if isinstance(m, (nn.Linear, Diagonal))]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if init == "zero" and layers:
            nn.init.zeros_(layers[-1].weight)

    def change(self, chosen: Tensor) -> Tensor:
        """What is added to the channels S, of these channels alone, `(..., K)` or with channels on `axis`."""
        moved = self.axis not in (-1, chosen.ndim - 1)
        end = chosen.ndim - 1  # not -1: the legacy ONNX exporter takes an axis as it is
        last = chosen.movedim(self.axis, end) if moved else chosen
        change = self.update(last)
        if self.scale_on == "input":
            change = change + (self.scale - 1.0) * last
        elif self.scale != 1.0:
            change = self.scale * change
        return change.movedim(end, self.axis) if moved else change

    def forward(self, x: Tensor) -> Tensor:
        """`x` with its channels tuned; same shape."""
        if not len(self.channels):
            return x
        return self.added(x, self.change(x.index_select(self.axis, self.channels)))

    def added(self, x: Tensor, change: Tensor) -> Tensor:
        """`x` with `change` added to the channels S."""
        if torch.onnx.is_in_onnx_export():  # whose index_add keeps the batch size of the example
            spread = nn.functional.one_hot(self.channels, self.dim).to(x.dtype)
            end = x.ndim - 1
            if self.axis in (-1, end):
                return x + change @ spread
            return x + (change.movedim(self.axis, end) @ spread).movedim(end, self.axis)
        return x.index_add(self.axis, self.channels, change.to(x.dtype))

    def matrix(self) -> tuple[Tensor, Tensor]:
        """The module as one affine map ``x + P x + p``: P `(C, C)` and p `(C,)`, for merging.

        Raises:
            ValueError: the form is not linear in x (`mlp`).
        """
        if self.form == "mlp":
            raise ValueError("a ChannelTuning of form 'mlp' is no linear map")
        size = len(self.channels)
        with torch.no_grad():
            device = self.channels.device
            bias = self.update(torch.zeros(1, size, device=device))[0] if size else torch.zeros(0, device=device)
            weight = (
                (self.update(torch.eye(size, device=device)) - bias).T if size else torch.zeros(0, 0, device=device)
            )
            if self.scale_on == "module":
                weight, bias = self.scale * weight, self.scale * bias
            else:
                weight = weight + (self.scale - 1.0) * torch.eye(size, device=device)
            whole = torch.zeros(self.dim, self.dim, device=device, dtype=weight.dtype)
            whole[self.channels[:, None], self.channels] = weight
            shift = torch.zeros(self.dim, device=device, dtype=weight.dtype)
            shift[self.channels] = bias
        return whole, shift

    def extra_repr(self) -> str:
        """For print."""
        return f"{len(self.channels)} of {self.dim} channels, scale={self.scale}, form={self.form}"


class Diagonal(nn.Module):
    """A scale and a shift of every channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``w x + b``."""
        return x * self.weight[0] + self.bias


_FORMS: dict[str, Any] = {
    "linear": lambda size, rank: nn.Linear(size, size),
    "diagonal": lambda size, rank: Diagonal(size),
    "lowrank": lambda size, rank: nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size)),
    "mlp": lambda size, rank: nn.Sequential(nn.Linear(size, rank), nn.GELU(), nn.Linear(rank, size)),
}


class StreamTuning(OnStream):
    """`ChannelTuning` of the residual stream behind the attention, before the MLP's norm (site `attn`)."""

    def __init__(self, tuning: ChannelTuning) -> None:
        super().__init__()
        self.tuning = tuning

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        """What the branch adds so that the stream behind it is the tuned one."""
        tuning = self.tuning
        if not len(tuning.channels):
            return branch
        axis, channels = tuning.axis, tuning.channels
        chosen = stream.index_select(axis, channels) + branch.index_select(axis, channels)
        return tuning.added(branch, tuning.change(chosen))


class OutputTuning(OnOutput):
    """`ChannelTuning` of a module's output (sites `mlp` and `block`)."""

    def __init__(self, tuning: ChannelTuning) -> None:
        super().__init__()
        self.tuning = tuning

    def forward(self, output: Tensor) -> Tensor:
        """The tuned output."""
        return self.tuning(output)


class QueryValueTuning(OnOutput):
    """`ChannelTuning` of the q and v parts of a packed qkv output, before heads are split (site `qv`)."""

    def __init__(self, query: ChannelTuning, value: ChannelTuning) -> None:
        super().__init__()
        self.query, self.value = query, value

    def forward(self, qkv: Tensor) -> Tensor:
        """`(..., 3 C)` of the same shape."""
        query, key, value = qkv.chunk(3, dim=-1)
        return torch.cat([self.query(query), key, self.value(value)], dim=-1)
