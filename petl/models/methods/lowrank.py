"""Low-rank changes of linear layers: LoRA and FacT (sections 2.5 and 2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petl.models.methods.base import Match, Method, checked_init, chosen_blocks, need
from petl.models.sites import Backbone, Beside, NoSite, Place

PARTS = ("q", "k", "v")
LAYERS = ("proj", "fc1", "fc2")


# ------------------------------------------------------------------ LoRA
class LowRank(Beside):
    """``y + (alpha / r) B A x`` of a linear layer, or of parts of its output.

    Args:
        place: the linear layer.
        rank: r.
        scale: alpha / r.
        parts: which of `pieces` equal parts of the output are changed, each by two matrices of its own.
        pieces: 3 for a packed qkv, else 1.
        dropout: of x.
    """

    def __init__(
        self, place: Place, rank: int, scale: float, parts: Sequence[int], pieces: int, dropout: float
    ) -> None:
        super().__init__()
        inputs, outputs = place.module.in_features, place.module.out_features
        self.rank, self.scale, self.parts, self.pieces = rank, scale, tuple(parts), pieces
        self.down = nn.Parameter(torch.empty(len(parts) * rank, inputs))
        self.up = nn.Parameter(torch.zeros(len(parts), outputs // pieces, rank))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down, a=5**0.5)  # the bound depends on the inputs alone

    def spread_up(self) -> Tensor:
        """B of all outputs, `(outputs, len(parts) r)`: zero where a part is not changed or belongs to another A."""
        if self.pieces == 1:
            return self.up[0]
        width = len(self.parts) * self.rank
        rows = []
        for piece in range(self.pieces):
            if piece in self.parts:
                at = self.parts.index(piece)
                rows.append(nn.functional.pad(self.up[at], (at * self.rank, width - (at + 1) * self.rank)))
            else:
                rows.append(self.up.new_zeros(self.up.shape[1], width))
        return torch.cat(rows)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        hidden = nn.functional.linear(self.dropout(x), self.down)
        if self.scale != 1.0:
            hidden = self.scale * hidden  # of r channels: cheaper than of the output's
        return nn.functional.linear(hidden, self.spread_up())

    def matrix(self) -> tuple[Tensor, None]:
        """The change of the layer's weight, `(outputs, inputs)`, for merging; its bias stays."""
        return self.scale * self.spread_up() @ self.down, None


class LoRA(Method):
    """Low-rank updates of attention and MLP layers.

    Args:
        rank: r; or a list with one rank a block, in which 0 leaves a block out.
        alpha: the update is scaled by alpha / r; None: r.
        targets: any of q, k, v, proj, fc1, fc2. Parts of a packed qkv have matrices of their own.
        packed: one pair of matrices for the whole qkv (NOAH); `targets` then holds q, k and v or none of them.
        dropout: of the input.
        init: `paper`: B is zero; `released`: both are a truncated normal of deviation 0.02, as timm's initialisation
            leaves them.
        layers: see `chosen_blocks`.

    Raises:
        ValueError: unknown targets, none, or a part of qkv with `packed`.
    """

    def __init__(
        self,
        rank: int | Sequence[int] = 8,
        alpha: float | None = None,
        targets: Sequence[str] = ("q", "v"),
        packed: bool = False,
        dropout: float = 0.0,
        init: str = "paper",
        layers: str | Sequence[int] | None = None,
    ) -> None:
        targets = tuple(targets)
        if not targets or set(targets) - {*PARTS, *LAYERS}:
            raise ValueError(f"targets={list(targets)}: some of {[*PARTS, *LAYERS]}")
        if packed and 0 < len(set(targets) & set(PARTS)) < 3:
            raise ValueError(f"packed=true changes q, k and v together; targets are {list(targets)}")
        self.rank = rank if isinstance(rank, int) else list(rank)
        self.alpha, self.targets, self.packed, self.dropout = alpha, targets, packed, dropout
        self.init, self.layers = checked_init(init), layers

    def match(self, backbone: Backbone) -> Match:
        """One module for the qkv layer (all its parts), and one for every other layer that is named."""
        found = Match()
        parts = [PARTS.index(part) for part in PARTS if part in self.targets]
        for index, block in chosen_blocks(backbone, self.layers):
            rank = self.rank if isinstance(self.rank, int) else self.rank[index]
            if not rank:
                continue
            scale = 1.0 if self.alpha is None else self.alpha / rank
            sites: list[tuple[str, Sequence[int], int]] = [(name, [0], 1) for name in LAYERS if name in self.targets]
            if parts:
                sites.insert(0, ("qkv", [0], 1) if self.packed else ("qkv", parts, 3))
            for name, changed, pieces in sites:
                place = backbone.site(block, name)
                if not isinstance(place.module, nn.Linear):
                    raise NoSite(f"{place.name} is a {type(place.module).__name__}, not a linear layer")
                module = LowRank(place, rank, scale, changed, pieces, self.dropout)
                if self.init == "released":
                    nn.init.trunc_normal_(module.down, std=0.02)
                    nn.init.trunc_normal_(module.up, std=0.02)
                module.attach(place)
                found.modules[place.name] = module
        return need(found, self, backbone)


# ------------------------------------------------------------------ FacT
class Factors(nn.Module):
    """What all layers share: U `(r, C)`, V `(C, r)`, and for Tucker (`tk`) the core `(r, r, r)` and P `(r, 12 L)`."""

    def __init__(self, dim: int, rank: int, columns: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)
        if columns:
            self.core, self.columns = (
                nn.Parameter(torch.empty(rank, rank, rank)),
                nn.Parameter(torch.empty(rank, columns)),
            )
            nn.init.xavier_uniform_(self.core)
            nn.init.xavier_uniform_(self.columns)


class Factorised(Beside):
    """``y + s V Sigma U x`` with the shared factors and a Sigma of this layer.

    `inputs` and `outputs` are how many blocks of C channels the layer reads and gives: (1, 3) qkv, (1, 1) proj, (1, m)
    fc1, (m, 1) fc2. In `tt` every Sigma is a parameter. In `tk` it is the core contracted with the layer's columns of
    P; the m matrices of fc1 are laid out `(r, r, m)` and read as `(r, m r)`, which interleaves them, and fc2's are that
    transposed: so the released weights were trained.

    Args:
        factors: shared by the whole network; registered there, not here.
        kind: `tt` or `tk`.
        rank: r.
        inputs: blocks of channels of the input.
        outputs: blocks of channels of the output.
        separate: one Sigma for every output block (qkv) instead of one wide Sigma (fc1).
        first: the first column of P that belongs to the layer.
        scale: s.
        dropout: between Sigma and V.
    """

    def __init__(
        self,
        factors: Factors,
        kind: str,
        rank: int,
        inputs: int,
        outputs: int,
        separate: bool,
        first: int,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self._factors = (factors,)
        self.inputs, self.outputs, self.separate, self.scale = inputs, outputs, separate, scale
        self.first, self.dropout = first, nn.Dropout(dropout)
        if kind == "tt":
            # (out, in) of one linear layer without bias, or one for every output block, below each other.
            self.sigma = nn.Parameter(torch.empty(outputs * rank, inputs * rank))
            nn.init.kaiming_uniform_(self.sigma, a=5**0.5)
        else:
            self.sigma = None

    def _sigma(self) -> Tensor:
        """`(outputs r, inputs r)`."""
        if self.sigma is not None:
            return self.sigma
        factors = self._factors[0]
        count = max(self.inputs, self.outputs)
        matrices = factors.core @ factors.columns[:, self.first : self.first + count]  # (r, r, count)
        if self.separate or count == 1:
            return matrices.permute(2, 1, 0).flatten(0, 1)  # (U x) M: the transpose of each, below each other
        wide = matrices.flatten(1)  # (r, count r), interleaved
        return wide.T if self.outputs > 1 else wide

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        factors = self._factors[0]
        hidden = factors.down(x.unflatten(-1, (self.inputs, -1))).flatten(-2)
        hidden = self.dropout(nn.functional.linear(hidden, self._sigma()))
        return self.scale * factors.up(hidden.unflatten(-1, (self.outputs, -1))).flatten(-2)

    def matrix(self) -> tuple[Tensor, None]:
        """The change of the layer's weight, for merging."""
        factors = self._factors[0]
        down = torch.block_diag(*[factors.down.weight] * self.inputs)
        up = torch.block_diag(*[factors.up.weight] * self.outputs)
        return self.scale * up @ self._sigma() @ down, None


class FacT(Method):
    """All weight changes of the network as one factorised tensor.

    Args:
        kind: `tt` (tensor train) or `tk` (Tucker).
        rank: r.
        scale: s, per task in its paper (section 4).
        dropout: between Sigma and V.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str = "tt", rank: int = 16, scale: float = 1.0, dropout: float = 0.1) -> None:
        if kind not in ("tt", "tk"):
            raise ValueError(f"kind='{kind}' is neither tt nor tk")
        self.kind, self.rank, self.scale, self.dropout = kind, rank, scale, dropout

    def match(self, backbone: Backbone) -> Match:
        """Four modules a block, and what they share.

        Raises:
            NoSite: blocks differ in width, or the MLP's is no multiple of it.
        """
        dims = {block.dim for block in backbone.blocks}
        if len(dims) > 1:
            raise NoSite(f"FacT shares its factors between blocks of one width; these have {sorted(dims)}")
        dim = dims.pop()
        per_block, found = 0, Match()
        plans: list[tuple[Place, dict[str, Any]]] = []
        for block in backbone.blocks:
            places = {name: backbone.site(block, name) for name in ("qkv", "proj", "fc1", "fc2")}
            ratio, rest = divmod(getattr(places["fc1"].module, "out_features", 0), dim)
            if rest or not ratio:
                raise NoSite(
                    f"FacT needs an MLP of a multiple of {dim} channels; {places['fc1'].name} has another width"
                )
            start = per_block
            for name, shape, separate in (
                ("qkv", (1, 3), True),
                ("proj", (1, 1), False),
                ("fc1", (1, ratio), False),
                ("fc2", (ratio, 1), False),
            ):
                plans.append(
                    (places[name], {"inputs": shape[0], "outputs": shape[1], "separate": separate, "first": start})
                )
                start += max(shape)
            per_block = start
        factors = Factors(dim, self.rank, per_block if self.kind == "tk" else 0)
        found.modules["factors"] = factors
        for place, plan in plans:
            module = Factorised(factors, self.kind, self.rank, scale=self.scale, dropout=self.dropout, **plan)
            module.attach(place)
            found.modules[place.name] = module
        return need(found, self, backbone)
