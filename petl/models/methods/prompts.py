"""Learned tokens beside the patches: visual prompt tuning, and NOAH's subnets (sections 2.5 and 2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from petl.models.methods.adapters import Adapter
from petl.models.methods.base import Match, Method, need
from petl.models.methods.lowrank import LoRA
from petl.models.sites import Backbone, NoSite, OnInput, OnOutput


class Prompts(OnInput):
    """Puts its prompts among the tokens and takes out those of the block before.

    Args:
        length: prompts.
        dim: C.
        bound: they begin uniform in [-bound, bound].
        before: prompts that the block before has put in.
        at: index of the first prompt; None: behind all tokens.
        dropout: of the prompts.
    """

    def __init__(self, length: int, dim: int, bound: float, before: int, at: int | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(length, dim).uniform_(-bound, bound)) if length else None
        self.before, self.at, self.dropout = before, at, nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N + before, C)` to `(B, N + length, C)`."""
        if self.prompts is None:
            return _without(tokens, self.before, self.at)
        prompts = self.dropout(self.prompts).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        if self.at is None:
            return torch.cat([tokens[:, : tokens.shape[1] - self.before], prompts], dim=1)
        return torch.cat([tokens[:, : self.at], prompts, tokens[:, self.at + self.before :]], dim=1)


class WithoutPrompts(OnOutput):
    """Takes the prompts out behind the last block, so that norm, pooling and head see the network's own tokens."""

    def __init__(self, length: int, at: int | None) -> None:
        super().__init__()
        self.length, self.at = length, at

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N + length, C)` to `(B, N, C)`."""
        return _without(tokens, self.length, self.at)


def _without(tokens: Tensor, length: int, at: int | None) -> Tensor:
    if at is None:
        return tokens[:, : tokens.shape[1] - length]
    return torch.cat([tokens[:, :at], tokens[:, at + length :]], dim=1)


class VPT(Method):
    """Prompts between the class token and the patches, at the first block (shallow) or anew at every block (deep).

    Args:
        length: prompts.
        deep: see above.
        dropout: of prompts.
        init: `paper`: uniform within sqrt(6 / (3 p^2 + C)) for patches of p pixels (from memory); `released`: within
            sqrt(6 / C) (V-PETL Bench).
    """

    identity: ClassVar[bool] = False

    def __init__(self, length: int = 10, deep: bool = True, dropout: float = 0.1, init: str = "paper") -> None:
        if length < 1:
            raise ValueError(f"length={length}: at least one prompt")
        if init not in ("paper", "released"):
            raise ValueError(f"init='{init}' is none of ['paper', 'released']")
        self.length, self.deep, self.dropout, self.init = length, deep, dropout, init

    def match(self, backbone: Backbone) -> Match:
        """Prompts of one block or of all."""
        at, found = backbone.prefix_tokens, Match()
        for index, block in enumerate(backbone.blocks if self.deep else backbone.blocks[:1]):
            module = Prompts(
                self.length, block.dim, self._bound(backbone, block.dim), self.length if index else 0, at, self.dropout
            )
            module.attach(block.block)
            found.modules[block.block.name] = module
        last = WithoutPrompts(self.length, at)
        last.attach(backbone.blocks[-1].block)
        found.modules["after"] = last
        return need(found, self, backbone)

    def _bound(self, backbone: Backbone, dim: int) -> float:
        if self.init == "released":
            return (6 / dim) ** 0.5
        height, width = backbone.model.patch_embed.patch_size
        return (6 / (3 * height * width + dim)) ** 0.5


class NOAHSubnet(Method):
    """A network that NOAH's search has found: prompts behind the patches, packed LoRA, adapters, sized block by block.

    The authors also train and count prompts of the model itself, which their first block takes out before any
    attention; here there are none (`sampled_parameters` counts them as they do).

    Args:
        prompts: of every block.
        lora: rank of every block.
        adapters: bottleneck of every block.
        init: see `LoRA` and `Adapter`.

    Raises:
        ValueError: the lists differ in length.
    """

    identity: ClassVar[bool] = False

    def __init__(
        self, prompts: Sequence[int], lora: Sequence[int], adapters: Sequence[int], init: str = "paper"
    ) -> None:
        if not len(prompts) == len(lora) == len(adapters):
            raise ValueError(f"one size a block: {len(prompts)} prompts, {len(lora)} LoRA, {len(adapters)} adapters")
        self.prompts, self.lora, self.adapters, self.init = list(prompts), list(lora), list(adapters), init

    def match(self, backbone: Backbone) -> Match:
        """What every block has.

        Raises:
            NoSite: the network has another number of blocks, or no sequence of tokens.
        """
        if any(self.prompts):
            _ = backbone.prefix_tokens  # raises where there are no tokens
        if len(self.prompts) != len(backbone.blocks):
            raise NoSite(f"sizes of {len(self.prompts)} blocks for a network of {len(backbone.blocks)}")
        found = Match()
        if any(self.prompts):
            before = 0
            for block, length in zip(backbone.blocks, self.prompts, strict=True):
                if not length and not before:
                    continue
                module = Prompts(length, block.dim, (6 / block.dim) ** 0.5, before, None)
                module.attach(block.block)
                found.modules[block.block.name] = module
                before = length
            last = WithoutPrompts(before, None)
            last.attach(backbone.blocks[-1].block)
            found.modules["after"] = last
        if any(self.lora):
            lora = LoRA(self.lora, targets=("q", "k", "v"), packed=True, init=self.init)
            found.modules |= lora.match(backbone).modules
        for index, size in enumerate(self.adapters):
            if size:
                adapter = Adapter(size, act="quick_gelu", after_drop_path=True, init=self.init, layers=[index])
                found.modules |= adapter.match(backbone).modules
        return need(found, self, backbone)

    def sampled_parameters(self, dim: int) -> int:
        """What the authors count, with `prompts[0]` prompts of the model that nothing ever sees."""
        prompts = (sum(self.prompts) + self.prompts[0]) * dim
        lora = sum(rank * 4 * dim for rank in self.lora)
        return prompts + lora + sum(size * 2 * dim + size + dim for size in self.adapters if size)
