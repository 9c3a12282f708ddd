"""What every method of a table is: one object that says what is trained and what is added to a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from petl.models.sites import Backbone, BlockSites, NoSite

INITS = ("paper", "released")


@dataclass
class Match:
    """What a method found in a backbone.

    modules: what it adds, by the name of the place: these are trained.
    trained: names of the backbone's own parameters that are trained.
    kept: names of those that an earlier stage has trained: frozen, but part of what is saved.
    chosen: False while the channels of a module are yet to be chosen.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    chosen: bool = True


class Method:
    """One way to tune. A subclass implements `match`; its constructor takes plain arguments with the paper's defaults.

    `identity`: at first the tuned network equals the frozen one (where `init` is `paper`).
    """

    identity: ClassVar[bool] = True

    def match(self, backbone: Backbone) -> Match:
        """Finds the places and puts the modules there.

        Raises:
            NoSite: there is no such place.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The name and all arguments, as a delta file keeps them."""
        return {"method": type(self).__name__, **{k: _plain(v) for k, v in vars(self).items() if not k.startswith("_")}}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({arguments})"


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.config()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


class Together(Method):
    """Several methods at once, e.g. LayerNorms beside channels (the one-stage row `joint`)."""

    def __init__(self, methods: Sequence[Method]) -> None:
        if not methods:
            raise ValueError("Together needs at least one method")
        self.methods = list(methods)

    @property
    def starts_as_backbone(self) -> bool:
        """See `starts_as_backbone`."""
        return all(starts_as_backbone(method) for method in self.methods)

    def match(self, backbone: Backbone) -> Match:
        """Every method's, one after the other."""
        whole = Match()
        for number, method in enumerate(self.methods):
            found = method.match(backbone)
            for name, module in found.modules.items():
                whole.modules[name if name not in whole.modules else f"{name}.{number}"] = module
            whole.trained += [name for name in found.trained if name not in whole.trained]
            whole.kept += [name for name in found.kept if name not in whole.kept]
            whole.chosen = whole.chosen and found.chosen
        whole.kept = [name for name in whole.kept if name not in whole.trained]
        return whole


def starts_as_backbone(method: Method) -> bool:
    """Whether the tuned network gives the frozen one's outputs at first."""
    own = getattr(method, "starts_as_backbone", None)
    return type(method).identity and getattr(method, "init", "paper") != "released" if own is None else bool(own)


def chosen_blocks(backbone: Backbone, layers: str | Sequence[int] | None) -> Iterator[tuple[int, BlockSites]]:
    """The blocks that are tuned: all (None or `all`), `first_half`, `last_half`, or a list of indices.

    Raises:
        ValueError: an unknown word, or an index that the network does not have.
    """
    count = len(backbone.blocks)
    words = {"all": range(count), "first_half": range(count // 2), "last_half": range(count // 2, count)}
    if layers is None or isinstance(layers, str):
        if (layers or "all") not in words:
            raise ValueError(f"layers='{layers}' is none of {list(words)} or a list of indices")
        wanted: Sequence[int] = words[layers or "all"]
    else:
        wanted = sorted(range(count)[i] if -count <= i < count else i for i in layers)
        if wrong := [i for i in wanted if not 0 <= i < count]:
            raise ValueError(f"layers: the network has blocks 0 to {count - 1}, not {wrong}")
    for index in wanted:
        yield index, backbone.blocks[index]


def checked_init(init: str) -> str:
    """`paper` or `released`.

    Raises:
        ValueError: anything else.
    """
    if init not in INITS:
        raise ValueError(f"init='{init}' is none of {list(INITS)}")
    return init


def released_init(module: nn.Module) -> None:
    """What the released baselines have in fact: timm's initialisation of the whole model runs last, over theirs.

    Every linear layer gets a truncated normal of deviation 0.02 and no bias (section 10, number 3).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def need(found: Match, method: Method, backbone: Backbone) -> Match:
    """`found`, if it holds anything.

    Raises:
        NoSite: it is empty.
    """
    if not found.modules and not found.trained:
        kinds: dict[str, int] = {}
        for module in backbone.model.modules():
            kinds[type(module).__name__] = kinds.get(type(module).__name__, 0) + 1
        raise NoSite(f"{method!r} matches nothing in {type(backbone.model).__name__}, which has {kinds}")
    return found
