"""Bottlenecks beside or behind a block's branches: Adapter, AdaptFormer, Convpass, RepAdapter (section 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from petl.models.methods.base import Match, Method, checked_init, chosen_blocks, need, released_init
from petl.models.sites import Backbone, BlockSites, OnInput, OnOutput, OnStream, Place


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"act='{name}' is none of {list(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


# ------------------------------------------------------------------ Adapter
class SequentialAdapter(OnOutput):
    """``h + up(act(down h))`` of a branch's output h `(..., C)`."""

    def __init__(self, dim: int, bottleneck: int, act: str) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(dim, bottleneck), _activation(act), nn.Linear(bottleneck, dim)
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, branch: Tensor) -> Tensor:
        """Same shape."""
        return branch + self.up(self.act(self.down(branch)))


class Adapter(Method):
    """Bottlenecks behind the MLP (`mlp`, Pfeiffer), the attention (`attn`), or both (`both`, Houlsby).

    Args:
        dim: bottleneck r.
        place: `mlp`, `attn` or `both`.
        act: `gelu` (SCT) or `quick_gelu` (NOAH), `relu`.
        after_drop_path: behind stochastic depth (NOAH) instead of before it (SCT).
        init: `paper`: Xavier, biases of deviation 1e-6 (NOAH's); `released`: see `released_init`.
        layers: see `chosen_blocks`.
    """

    identity: ClassVar[bool] = False

    def __init__(
        self,
        dim: int = 8,
        place: str = "mlp",
        act: str = "gelu",
        after_drop_path: bool = False,
        init: str = "paper",
        layers: str | Sequence[int] | None = None,
    ) -> None:
        if place not in ("mlp", "attn", "both"):
            raise ValueError(f"place='{place}' is none of ['mlp', 'attn', 'both']")
        _activation(act)
        self.dim, self.place, self.act, self.after_drop_path = dim, place, act, after_drop_path
        self.init, self.layers = checked_init(init), layers

    def match(self, backbone: Backbone) -> Match:
        """One bottleneck for every branch that is named."""
        found = Match()
        for _, block in chosen_blocks(backbone, self.layers):
            for branch in ("attn", "mlp") if self.place == "both" else (self.place,):
                site = {"attn": "end1", "mlp": "end2"}[branch] if self.after_drop_path else branch
                module = SequentialAdapter(block.dim, self.dim, self.act)
                if self.init == "released":
                    released_init(module)
                module.attach(backbone.site(block, site))
                found.modules[f"{block.block.name}.{branch}"] = module
        return need(found, self, backbone)


# ------------------------------------------------------------------ AdaptFormer
class ParallelAdapter(OnStream):
    """``branch + s up(relu(down(LN? x)))`` of the residual stream x before the MLP's norm; no stochastic depth."""

    def __init__(self, dim: int, bottleneck: int, scale: float, norm: bool, act: str, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.down, self.act, self.up = nn.Linear(dim, bottleneck), _activation(act), nn.Linear(bottleneck, dim)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        """Same shape as `branch`."""
        return branch + self.scale * self.up(self.dropout(self.act(self.down(self.norm(stream)))))


class AdaptFormer(Method):
    """A bottleneck in parallel to norm and MLP.

    Args:
        dim: bottleneck r.
        scale: s (0.1 in its paper, from memory; SCT's copy has 1).
        norm: its own LayerNorm in front (SCT's copy).
        act: see `ACTIVATIONS`.
        dropout: between the two layers.
        init: `paper`: up is zero; `released`: see `released_init`.
        layers: see `chosen_blocks`.
    """

    def __init__(
        self,
        dim: int = 64,
        scale: float = 0.1,
        norm: bool = False,
        act: str = "relu",
        dropout: float = 0.0,
        init: str = "paper",
        layers: str | Sequence[int] | None = None,
    ) -> None:
        _activation(act)
        self.dim, self.scale, self.norm, self.act, self.dropout = dim, scale, norm, act, dropout
        self.init, self.layers = checked_init(init), layers

    def match(self, backbone: Backbone) -> Match:
        """One bottleneck a block."""
        found = Match()
        for _, block in chosen_blocks(backbone, self.layers):
            module = ParallelAdapter(block.dim, self.dim, self.scale, self.norm, self.act, self.dropout)
            if self.init == "released":
                released_init(module)
            module.attach(backbone.site(block, "norm2"), backbone.site(block, "end2"))
            found.modules[f"{block.block.name}.mlp"] = module
        return need(found, self, backbone)


# ------------------------------------------------------------------ Convpass
class ConvBypass(OnStream):
    """``branch + s up(qg(conv3x3(qg(down z))))`` of the normed input z of a branch (section 2.6).

    Patches are convolved on their grid with zero padding; the class token as an image of one pixel, for which only the
    kernel's centre acts.

    Args:
        dim: C.
        bottleneck: width h of the convolution.
        scale: s.
        grid: rows and columns of patches, where z is a sequence.
        prefix: tokens before the patches.
        xavier: the convolution begins with Xavier weights instead of the identity.
        dropout: before the last layer.
        drop_path: rate of stochastic depth of its own.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        scale: float,
        grid: tuple[int, int],
        prefix: int,
        xavier: bool,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        self.conv, self.act = nn.Conv2d(bottleneck, bottleneck, 3, padding=1), QuickGELU()
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)
        self.scale, self.grid, self.prefix = scale, grid, prefix
        nn.init.xavier_uniform_(self.down.weight)
        if xavier:
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.zeros_(self.conv.weight)
            with torch.no_grad():
                self.conv.weight[:, :, 1, 1] += torch.eye(bottleneck)
        for tensor in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, z: Tensor, branch: Tensor) -> Tensor:
        """Same shape as `branch`."""
        hidden = self.act(self.down(z))
        if hidden.ndim == 4:  # a feature map (B, H, W, C)
            hidden = self.conv(hidden.movedim(-1, 1)).movedim(1, -1)
        else:
            first, patches = hidden[:, : self.prefix], hidden[:, self.prefix :]
            image = patches.transpose(1, 2).unflatten(2, self.grid)
            patches = self.conv(image).flatten(2).transpose(1, 2)
            first = nn.functional.linear(first, self.conv.weight[:, :, 1, 1], self.conv.bias)
            hidden = torch.cat([first, patches], dim=1)
        return branch + self.drop_path(self.scale * self.up(self.dropout(self.act(hidden))))


class Convpass(Method):
    """Convolutional bypasses of the attention and the MLP.

    Args:
        dim: width of the convolution.
        scale: s, per task in its paper (section 4).
        place: `both`, or `attn` alone.
        xavier: see `ConvBypass`.
        dropout: before the last layer.
        init: `paper`: up is zero; `released` is the same, since Convpass is put in after timm's initialisation.
        layers: see `chosen_blocks`.
    """

    def __init__(
        self,
        dim: int = 8,
        scale: float = 1.0,
        place: str = "both",
        xavier: bool = False,
        dropout: float = 0.1,
        layers: str | Sequence[int] | None = None,
    ) -> None:
        if place not in ("both", "attn", "mlp"):
            raise ValueError(f"place='{place}' is none of ['both', 'attn', 'mlp']")
        self.dim, self.scale, self.place, self.xavier = dim, scale, place, xavier
        self.dropout, self.layers = dropout, layers

    def match(self, backbone: Backbone) -> Match:
        """One bypass for every branch that is named."""
        found = Match()
        for _, block in chosen_blocks(backbone, self.layers):
            for branch, norm, end in (("attn", "norm1", "end1"), ("mlp", "norm2", "end2")):
                if self.place not in ("both", branch):
                    continue
                last = backbone.site(block, end)
                grid, prefix = _grid(backbone, block)
                rate = float(getattr(last.module, "drop_prob", 0.0) or 0.0)
                module = ConvBypass(block.dim, self.dim, self.scale, grid, prefix, self.xavier, self.dropout, rate)
                module.attach(backbone.site(block, norm), last, normed=True)
                found.modules[f"{block.block.name}.{branch}"] = module
        return need(found, self, backbone)


def _grid(backbone: Backbone, block: BlockSites) -> tuple[tuple[int, int], int]:
    """Rows and columns of a block's tokens, and the number of tokens before them."""
    resolution = getattr(block.block.module, "input_resolution", None)  # Swin's, which differ from stage to stage
    return (backbone.grid, backbone.prefix_tokens) if resolution is None else (tuple(resolution), 0)


# ------------------------------------------------------------------ RepAdapter
class GroupedAdapter(OnInput):
    """``z + s B(A z)`` before a linear layer, into which it can be folded: A is dense, B grouped (section 2.6).

    Group g maps hidden units ``[g h/G, (g+1) h/G)`` to output channels ``[g C/G, (g+1) C/G)``.
    """

    def __init__(self, dim: int, hidden: int, groups: int, scale: float, dropout: float) -> None:
        super().__init__()
        if hidden % groups or dim % groups:
            raise ValueError(f"groups={groups} divides neither or only one of hidden={hidden} and dim={dim}")
        self.scale, self.groups = scale, groups
        self.down, self.dropout = nn.Linear(dim, hidden), nn.Dropout(dropout)
        self.up = nn.Conv1d(hidden, dim, 1, groups=groups)  # keeps the official layout (C, h / G, 1)
        nn.init.xavier_uniform_(self.down.weight)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, z: Tensor) -> Tensor:
        """Same shape."""
        hidden = self.dropout(self.down(z)).unflatten(-1, (self.groups, -1))
        up = self.up.weight[..., 0].unflatten(0, (self.groups, -1))
        change = torch.einsum("...gh,gch->...gc", hidden, up).flatten(-2) + self.up.bias
        return z + self.scale * change

    def matrix(self) -> tuple[Tensor, Tensor]:
        """``z + P z + p``: P `(C, C)` and p `(C,)`, for merging."""
        blocks = self.up.weight[..., 0].unflatten(0, (self.groups, -1))
        up = torch.block_diag(*blocks)
        return self.scale * up @ self.down.weight, self.scale * (up @ self.down.bias + self.up.bias)


class RepAdapter(Method):
    """Adapters before qkv and before fc1.

    Args:
        dim: hidden units h.
        groups: of the second layer.
        scale: s, per task in its paper (section 4).
        place: `both`, or `attn` alone.
        dropout: between the two layers.
        layers: see `chosen_blocks`.
    """

    def __init__(
        self,
        dim: int = 8,
        groups: int = 2,
        scale: float = 1.0,
        place: str = "both",
        dropout: float = 0.1,
        layers: str | Sequence[int] | None = None,
    ) -> None:
        if place not in ("both", "attn", "mlp"):
            raise ValueError(f"place='{place}' is none of ['both', 'attn', 'mlp']")
        self.dim, self.groups, self.scale, self.place, self.dropout = dim, groups, scale, place, dropout
        self.layers = layers

    def match(self, backbone: Backbone) -> Match:
        """One adapter for every branch that is named."""
        found = Match()
        for _, block in chosen_blocks(backbone, self.layers):
            for branch, site in (("attn", "qkv"), ("mlp", "fc1")):
                if self.place in ("both", branch):
                    place = _linear(backbone.site(block, site))
                    module = GroupedAdapter(place.module.in_features, self.dim, self.groups, self.scale, self.dropout)
                    module.attach(place)
                    found.modules[f"{block.block.name}.{branch}"] = module
        return need(found, self, backbone)


def _linear(place: Place) -> Place:
    from petl.models.sites import NoSite

    if not isinstance(place.module, nn.Linear):
        raise NoSite(f"{place.name} is a {type(place.module).__name__}, not a linear layer")
    return place
