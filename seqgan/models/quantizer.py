"""Vector quantisation: every feature becomes its nearest code (equation 2 of the paper)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.layers.precision import no_autocast

INITS = ("flax", "taming")
GRADIENTS = ("straight_through", "rotation")


class Quantized(NamedTuple):
    """What quantisation gives.

    z_q: codes in place of features, with the gradient of the features, `(B, C, H, W)`, in the codebook's precision.
    indices: of the codes, `(B, H, W)` int64.
    losses: weighted terms by name (`codebook`, `commit` and, where there is one, `entropy`); their sum is the loss.
    """

    z_q: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class VectorQuantizer(nn.Module):
    """A codebook of `size` codes of `dim` channels; computed in float32, also under autocast or in half precision.

    Args:
        size: number of codes K.
        dim: channels C.
        beta: weight of the commitment term.
        legacy_beta: put `beta` on the codebook term instead, as the code of VQGAN does by default.
        entropy: module that turns squared distances `(B, N, K)` into a further term, e.g. `UsageEntropy`; None: none.
        init: `flax`: uniform within sqrt(3/K), MaskGIT's; `taming`: uniform within 1/K.
        gradient: that features get: `straight_through`, the codes' own; `rotation`, see `rotated`.
        block: positions at a time in the search for the nearest code.

    Raises:
        ValueError: an unknown init or gradient, or sizes below one.
    """

    def __init__(
        self,
        size: int = 1024,
        dim: int = 256,
        beta: float = 0.25,
        *,
        legacy_beta: bool = False,
        entropy: nn.Module | None = None,
        init: str = "flax",
        gradient: str = "straight_through",
        block: int = 16384,
    ) -> None:
        super().__init__()
        for name, value, known in (("init", init, INITS), ("gradient", gradient, GRADIENTS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use {', '.join(known)}")
        if size < 1 or dim < 1 or block < 1:
            raise ValueError(f"size {size}, dim {dim} and block {block} must be positive")
        self.size, self.dim, self.beta, self.legacy_beta, self.block = size, dim, beta, legacy_beta, block
        self.entropy, self.gradient = entropy, gradient
        self.frozen = False
        self.embedding = nn.Embedding(size, dim)
        bound = 1 / size if init == "taming" else math.sqrt(3 / size)
        nn.init.uniform_(self.embedding.weight, -bound, bound)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise features `(B, C, H, W)`.

        Raises:
            ValueError: features of another number of dimensions or channels.
        """
        if z.ndim != 4 or z.shape[1] != self.dim:
            raise ValueError(
                f"features are {tuple(z.shape)}, but codes have {self.dim} channels: (B, {self.dim}, H, W)"
            )
        with no_autocast(z):
            z = z.float()
            features = rearrange(z, "b c h w -> b (h w) c")
            squared = None
            if self.entropy is not None and torch.is_grad_enabled():
                squared = self.squared_distances(features)
                indices = squared.detach().argmin(dim=-1)
            else:
                indices = self.nearest(features)
            indices = rearrange(indices, "b (h w) -> b h w", h=z.shape[2])
            codes = self._codes(indices)
            losses = self.terms(z, codes)
            if self.entropy is not None:
                losses["entropy"] = self.entropy(self.squared_distances(features) if squared is None else squared)
            carrier = rotated(z, codes.detach()) if self.gradient == "rotation" else z
            # In this order the value is the code itself, so that decoding the indices gives the same image.
            z_q = codes.detach() + (carrier - carrier.detach())
            return Quantized(z_q.to(self.embedding.weight.dtype), indices, losses)

    def requires_grad_(self, requires_grad: bool = True) -> VectorQuantizer:
        """As of any module; False also freezes codes that no gradient moves, whatever `train` says afterwards."""
        self.frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    @property
    def moving(self) -> bool:
        """Whether a forward pass may change codes by itself, in kinds whose codes follow the features."""
        return self.training and torch.is_grad_enabled() and not self.frozen

    def terms(self, z: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Codebook and commitment losses of features and their codes, of one shape."""
        codebook, commit = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
        weights = (self.beta, 1.0) if self.legacy_beta else (1.0, self.beta)
        return {"codebook": weights[0] * codebook, "commit": weights[1] * commit}

    def codebook(self) -> Tensor:
        """The codes `(K, C)` that features are compared with, in float32."""
        return self.embedding.weight.float()

    def squared_distances(self, features: Tensor) -> Tensor:
        """Squared distances `(..., K)` of features `(..., C)` to the codes."""
        codes = self.codebook()
        return features.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * features @ codes.t()

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """Indices `(...)` of the codes nearest to features `(..., C)`.

        The features' own length does not change which code is nearest, so it is left out.
        """
        codes = self.codebook()
        lengths = codes.square().sum(-1)
        rows = [features.reshape(-1, self.dim).float()]
        if not (torch.jit.is_tracing() or torch.compiler.is_exporting()):  # else the number of parts would be frozen
            rows = rows[0].split(self.block)
        found = [torch.addmm(lengths, part, codes.t(), alpha=-2).argmin(dim=-1) for part in rows]
        return (found[0] if len(found) == 1 else torch.cat(found)).view(features.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes `(B, C, H, W)` of indices `(B, H, W)`, in the precision of the weights."""
        return self._codes(indices).to(self.embedding.weight.dtype)

    def _codes(self, indices: Tensor) -> Tensor:
        """The same in float32."""
        return F.embedding(indices, self.codebook()).permute(0, 3, 1, 2)


def rotated(z: Tensor, codes: Tensor) -> Tensor:
    """Features turned and stretched onto their codes, where turn and length are constants (Fifty et al. 2024).

    Gradients at the codes come back turned by the angle between code and feature, instead of unchanged.

    Args:
        z: `(B, C, H, W)`.
        codes: of the same shape, without gradient.
    """
    with torch.no_grad():
        before = z.norm(dim=1, keepdim=True).clamp_min(1e-6)
        length = codes.norm(dim=1, keepdim=True).clamp_min(1e-6)
        a, b = z / before, codes / length
        middle = F.normalize(a + b, dim=1)
        stretch = length / before
    # Two reflections make a rotation from direction a to direction b, whatever lies beside both stays.
    turned = z - 2 * middle * (middle * z).sum(1, keepdim=True) + 2 * b * (a * z).sum(1, keepdim=True)
    return stretch * turned
