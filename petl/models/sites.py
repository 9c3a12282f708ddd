"""Where a backbone can be tuned: its blocks, norms and linear layers, found by type, and how a module is put there.

A backbone of timm keeps its code, its parameters' names and its state dict: what a method adds is called by forward
hooks, which are bound methods of modules, so that copies, pickles, exports and compiled graphs hold them as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class NoSite(ValueError):
    """A method asks for a place that the backbone does not have; the message lists what there is."""


@dataclass(frozen=True)
class Place:
    """One module of a backbone, and on which axis of its output the channels are: -1, or 1 of (B, C, H, W)."""

    name: str
    module: nn.Module
    axis: int = -1


@dataclass(frozen=True)
class BlockSites:
    """One residual block; what a kind of block does not have is None.

    A pre-norm block is ``x = x + end1(attn(norm1(x)))``, ``x = x + end2(mlp(norm2(x)))``. The ends are the last modules
    of the two branches (stochastic depth, or the identity in its place): what is added there is added to the residual
    stream.
    """

    block: Place
    dim: int
    mlp: Place
    fc1: Place
    fc2: Place
    norm1: Place | None = None
    attn: Place | None = None
    qkv: Place | None = None
    proj: Place | None = None
    end1: Place | None = None
    norm2: Place | None = None
    end2: Place | None = None


def _pre_norm(name: str, block: Any) -> BlockSites:
    """timm's ViT and Swin blocks, which name their parts alike."""
    attn, mlp = block.attn, block.mlp
    return BlockSites(
        block=Place(name, block),
        dim=attn.qkv.in_features,
        norm1=Place(f"{name}.norm1", block.norm1),
        attn=Place(f"{name}.attn", attn),
        qkv=Place(f"{name}.attn.qkv", attn.qkv),
        proj=Place(f"{name}.attn.proj", attn.proj),
        end1=Place(f"{name}.drop_path1", block.drop_path1),
        norm2=Place(f"{name}.norm2", block.norm2),
        mlp=Place(f"{name}.mlp", mlp),
        fc1=Place(f"{name}.mlp.fc1", mlp.fc1),
        fc2=Place(f"{name}.mlp.fc2", mlp.fc2),
        end2=Place(f"{name}.drop_path2", block.drop_path2),
    )


def _convnext(name: str, block: ConvNeXtBlock) -> BlockSites:
    """A block with one branch; its MLP works on (B, H, W, C), or on (B, C, H, W) where it is made of convolutions."""
    axis = 1 if block.use_conv_mlp else -1
    return BlockSites(
        block=Place(name, block, axis=1),
        dim=block.mlp.fc1.weight.shape[1],
        norm1=Place(f"{name}.norm", block.norm, axis),
        mlp=Place(f"{name}.mlp", block.mlp, axis),
        fc1=Place(f"{name}.mlp.fc1", block.mlp.fc1, axis),
        fc2=Place(f"{name}.mlp.fc2", block.mlp.fc2, axis),
    )


#: How a block of a type is taken apart; further types can be added: ``petl.models.sites.ANATOMY[MyBlock] = function``.
ANATOMY: dict[type[nn.Module], Any] = {
    Block: _pre_norm,
    SwinTransformerBlock: _pre_norm,
    ConvNeXtBlock: _convnext,
}


@dataclass
class Backbone:
    """A network of timm, taken apart.

    model: the network itself.
    blocks: its residual blocks in order.
    head: name of the classifier, whose parameters belong to no method; "" for a network without one.
    """

    model: nn.Module
    blocks: list[BlockSites] = field(default_factory=list)
    head: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Backbone:
        """Finds the blocks by `isinstance` of the types in `ANATOMY`.

        Raises:
            NoSite: none of the network's modules is of one of these types.
        """
        blocks = []
        for name, module in model.named_modules():
            for kind, anatomy in ANATOMY.items():
                if isinstance(module, kind):
                    blocks.append(anatomy(name, module))
                    break
        if not blocks:
            kinds = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.children())})
            raise NoSite(
                f"{type(model).__name__} has none of the blocks {[kind.__name__ for kind in ANATOMY]}; it has {kinds}. "
                "Say how its block is taken apart: petl.models.sites.ANATOMY[Block] = function"
            )
        return cls(model, blocks, _head(model))

    def places(self, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> Iterator[Place]:
        """Every module of these types outside the head, in the order of registration."""
        for name, module in self.model.named_modules():
            if isinstance(module, kinds) and not self.in_head(name):
                yield Place(name, module, axis=_channel_axis(module, self.inside_convnext(name)))

    def in_head(self, name: str) -> bool:
        """Whether a module or parameter of this name belongs to the classifier."""
        return bool(self.head) and (name == self.head or name.startswith(f"{self.head}."))

    def inside_convnext(self, name: str) -> bool:
        """Whether the module is the MLP's part of a ConvNeXt block."""
        return any(name.startswith(f"{block.mlp.name}.") for block in self.blocks)

    def site(self, block: BlockSites, name: str) -> Place:
        """The place `name` (`attn`, `qkv`, `fc1`, ...) of a block.

        Raises:
            NoSite: blocks of this kind have no such place.
        """
        place = getattr(block, name, None)
        if not isinstance(place, Place):
            raise NoSite(
                f"{type(block.block.module).__name__} ({block.block.name}) has no '{name}'; "
                f"it has {[key for key, value in vars(block).items() if isinstance(value, Place)]}"
            )
        return place

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers.

        Raises:
            NoSite: the network works on feature maps and has no sequence of tokens.
        """
        if not all(isinstance(block.block.module, Block) for block in self.blocks):
            raise NoSite(
                f"{type(self.model).__name__} has no sequence of tokens, which this method needs; "
                f"its blocks are {sorted({type(b.block.module).__name__ for b in self.blocks})}"
            )
        return int(getattr(self.model, "num_prefix_tokens", 1))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the size for which the network was built."""
        return tuple(self.model.patch_embed.grid_size)


def _head(model: nn.Module) -> str:
    """The classifier's name: the `classifier` of timm's pretrained config, where the network has such a module."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = (config.get("classifier") if isinstance(config, dict) else getattr(config, "classifier", None)) or ""
    if isinstance(name, (tuple, list)):
        name = name[0]
    classifier = getattr(model, "get_classifier", lambda: None)()
    for candidate, module in model.named_modules():
        if module is classifier and candidate:
            return candidate
    return name if name and any(n == name for n, _ in model.named_modules()) else ""


def _channel_axis(module: nn.Module, inside_mlp: bool) -> int:
    if isinstance(module, LayerNorm2d):
        return 1
    return 1 if isinstance(module, nn.Conv2d) else -1


# ------------------------------------------------------------------ what is put there
class OnOutput(nn.Module):
    """A module whose forward pass changes the output of the place: ``y -> self(y)``."""

    def attach(self, place: Place) -> None:
        """Has the place call this module."""
        place.module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self(output)


class OnInput(nn.Module):
    """A module whose forward pass changes the first input of the place: ``x -> self(x)``."""

    def attach(self, place: Place) -> None:
        """Has the place call this module."""
        place.module.register_forward_pre_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])


class Beside(nn.Module):
    """A module in parallel to the place, whose forward pass is added to its output: ``y -> y + self(x)``."""

    def attach(self, place: Place) -> None:
        """Has the place call this module."""
        place.module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + self(args[0])


class OnStream(nn.Module):
    """A module that reads the residual stream before a branch and changes what the branch adds to it.

    `norm` is the norm with which the branch begins, `end` its last module: ``y -> self(x, y)`` with the stream x, or
    with what the norm makes of it.
    """

    def attach(self, norm: Place, end: Place, *, normed: bool = False) -> None:
        """Has both places call this module."""
        self._stream: tuple[Tensor, ...] = ()
        if normed:
            norm.module.register_forward_hook(self._remember_output)
        else:
            norm.module.register_forward_pre_hook(self._remember_input)
        end.module.register_forward_hook(self._hook)

    def _remember_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._stream = (args[0],)

    def _remember_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._stream = (output,)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        (stream,), self._stream = self._stream, ()  # let go at once: it would keep a batch alive
        return self(stream, output)
