"""Other ways to keep codebooks in use: moving averages, normalised codes of few channels, k-means with restarts.

`quantizer_of_kind` builds each by one key; table 5 of the paper compares some of them with the entropy term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.layers.clusters import kmeans as kmeans
from core.layers.precision import no_autocast
from seqgan.models.quantizer import Quantized, VectorQuantizer

KINDS = ("vq", "ema", "l2norm_factorized", "kmeans_restart")


def quantizer_of_kind(
    kind: str = "vq", size: int = 1024, dim: int = 256, beta: float = 0.25, **options: Any
) -> nn.Module:
    """A quantiser by the name of its kind.

    Args:
        kind: `vq`: `VectorQuantizer`; `ema`: `EMAQuantizer`; `l2norm_factorized`: `FactorizedQuantizer`;
            `kmeans_restart`: `RestartQuantizer`.
        size: codes K.
        dim: channels of the features.
        beta: weight of the commitment term.
        options: further arguments of that class.

    Raises:
        ValueError: an unknown kind.
    """
    kinds = dict(zip(KINDS, (VectorQuantizer, EMAQuantizer, FactorizedQuantizer, RestartQuantizer), strict=True))
    if kind not in kinds:
        raise ValueError(f"unknown quantizer {kind!r}: use {', '.join(KINDS)}")
    return kinds[kind](size, dim, beta, **options)


class EMAQuantizer(VectorQuantizer):
    """Codes are moving averages of the features that chose them; no gradient reaches them (van den Oord et al. 2017).

    Averages are those of all processes. They move in training alone, and not once the quantiser is `frozen`.

    Args:
        size: codes K.
        dim: channels.
        beta: weight of the commitment term.
        decay: of the averages.
        options: of `VectorQuantizer`.
    """

    def __init__(self, size: int = 1024, dim: int = 256, beta: float = 0.25, decay: float = 0.99, **options) -> None:
        super().__init__(size, dim, beta, **options)
        self.decay = decay
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones(size))
        self.register_buffer("cluster_sum", self.embedding.weight.detach().clone())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> EMAQuantizer:
        """Averages stay in float32 where the module goes to half precision, which would swallow their small steps."""
        super()._apply(fn, recurse)
        self.cluster_size, self.cluster_sum = self.cluster_size.float(), self.cluster_sum.float()
        return self

    def forward(self, z: Tensor) -> Quantized:
        """Quantise features `(B, C, H, W)`; in training the codes move afterwards."""
        found = super().forward(z)
        if self.moving:
            self._move(rearrange(z.detach().float(), "b c h w -> (b h w) c"), found.indices.flatten())
        return found

    def requires_grad_(self, requires_grad: bool = True) -> EMAQuantizer:
        """Whether codes move; they take no gradient either way."""
        super().requires_grad_(requires_grad)
        self.embedding.weight.requires_grad_(False)
        return self

    def codebook(self) -> Tensor:
        """The codes `(K, C)` as they are now: a copy, as they move before gradients are computed."""
        return super().codebook().clone()

    def terms(self, z: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """The commitment loss alone."""
        return {"commit": self.beta * F.mse_loss(z, codes.detach())}

    @torch.no_grad()
    def _move(self, features: Tensor, indices: Tensor) -> None:
        counts = torch.zeros_like(self.cluster_size).index_add_(0, indices, torch.ones_like(features[:, 0]))
        sums = torch.zeros_like(self.cluster_sum).index_add_(0, indices, features)
        for part in (counts, sums):
            _sum_over_processes(part)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.cluster_sum.lerp_(sums, 1 - self.decay)
        # A code that nobody chooses keeps its place. Its sum and size shrink alike until both are zero, so their
        # ratio would not keep it for ever.
        chosen = (counts > 0)[:, None]
        weight = self.embedding.weight
        weight.copy_(torch.where(chosen, self.cluster_sum / self.cluster_size.clamp_min(1e-30)[:, None], weight))


class RestartQuantizer(VectorQuantizer):
    """A codebook that begins at the clusters of the first batch, and whose idle codes begin anew at features.

    Both happen in training alone, and not once the quantiser is `frozen`.

    Args:
        size: codes K.
        dim: channels.
        beta: weight of the commitment term.
        patience: steps without use after which a code begins anew.
        iterations: of k-means on the first training batch.
        options: of `VectorQuantizer`.

    Raises:
        ValueError: no patience.
    """

    def __init__(
        self,
        size: int = 1024,
        dim: int = 256,
        beta: float = 0.25,
        patience: int = 50,
        iterations: int = 10,
        **options,
    ) -> None:
        super().__init__(size, dim, beta, **options)
        if patience < 1:
            raise ValueError(f"patience={patience}: at least one step")
        self.patience, self.iterations = patience, iterations
        self.register_buffer("idle", torch.zeros(size, dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, z: Tensor) -> Quantized:
        """Quantise features `(B, C, H, W)`; in training, codes may have been replaced before."""
        if not self.moving:
            return super().forward(z)
        features = rearrange(z.detach().float(), "b c h w -> (b h w) c")
        with torch.no_grad():
            if not self.started:
                self.embedding.weight.copy_(_from_first(kmeans(features, self.size, self.iterations)))
                self.started.fill_(True)
            self._restart(features)
        found = super().forward(z)
        used = torch.zeros_like(self.idle).index_fill_(0, found.indices.flatten(), 1)
        _sum_over_processes(used)
        self.idle.add_(1).masked_fill_(used > 0, 0)
        return found

    def _restart(self, features: Tensor) -> None:
        old = self.idle >= self.patience
        drawn = features[torch.randint(len(features), (self.size,), device=features.device)]
        weight = self.embedding.weight
        weight.copy_(torch.where(old[:, None], _from_first(drawn), weight))
        self.idle.masked_fill_(old, 0)


class UnitQuantizer(VectorQuantizer):
    """Codes of length one: the nearest is that of the largest cosine, for features of length one."""

    def codebook(self) -> Tensor:
        """The codes `(K, C)`, each of length one."""
        return F.normalize(self.embedding.weight.float(), dim=-1)


class FactorizedQuantizer(nn.Module):
    """Codes of few channels and length one between two projections (ViT-VQGAN, Yu et al. 2022; "F&N" of table 5).

    Args:
        size: codes K; the paper's row has 8192.
        dim: channels of the features.
        beta: weight of the commitment term.
        code_dim: channels of the codes.
        options: of `VectorQuantizer`.
    """

    def __init__(self, size: int = 8192, dim: int = 256, beta: float = 0.25, code_dim: int = 32, **options) -> None:
        super().__init__()
        self.size, self.dim = size, dim
        self.project = nn.Linear(dim, code_dim)
        self.codes = UnitQuantizer(size, code_dim, beta, **options)
        nn.init.normal_(self.codes.embedding.weight)  # evenly over all directions
        self.expand = nn.Linear(code_dim, dim)

    @property
    def embedding(self) -> nn.Embedding:
        """The codes, of any length."""
        return self.codes.embedding

    def forward(self, z: Tensor) -> Quantized:
        """Quantise features `(B, C, H, W)`."""
        with no_autocast(z):
            low = self._low(z.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            z_q, indices, losses = self.codes(low)
            return Quantized(self._high(z_q), indices, losses)

    def nearest(self, features: Tensor) -> Tensor:
        """Indices `(...)` of the codes nearest to features `(..., C)`."""
        return self.codes.nearest(self._low(features))

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes `(B, C, H, W)` of indices `(B, H, W)`, expanded."""
        return self._high(self.codes.lookup(indices))

    def _low(self, features: Tensor) -> Tensor:
        return F.normalize(self.project(features.to(self.project.weight.dtype)), dim=-1)

    def _high(self, codes: Tensor) -> Tensor:
        return self.expand(codes.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sum_over_processes(value: Tensor) -> None:
    if _several():
        dist.all_reduce(value)


def _from_first(value: Tensor) -> Tensor:
    """What the first process has, on all of them."""
    if _several():
        dist.broadcast(value, src=0)
    return value
