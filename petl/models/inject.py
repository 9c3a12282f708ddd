"""A method put into any backbone of timm: `inject`, and what can be asked of the result."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petl.models.methods.base import Match, Method, starts_as_backbone
from petl.models.sites import Backbone

HEAD_INITS = ("trunc", "zero")


class PetlModel(nn.Module):
    """A backbone with a method in it; its forward pass is the backbone's.

    `backbone` keeps the names of timm. What the method adds is in `tuning`, one module for every place, and is called
    by hooks of the backbone's modules. Made by `inject`.

    Args:
        backbone: the network, which is frozen but for what the method and the head train.
        method: see `petl.models.methods`.
        match: what it found.
        frozen_mode: `train`: stochastic depth and dropout of the frozen network act in training, as in the recipes of
            section 4; `eval`: they do not.
    """

    def __init__(self, backbone: Backbone, method: Method, match: Match, frozen_mode: str = "train") -> None:
        super().__init__()
        if frozen_mode not in ("train", "eval"):
            raise ValueError(f"frozen_mode='{frozen_mode}' is neither train nor eval")
        self.method, self.frozen_mode = method, frozen_mode
        self.weights: str | None = None  # file of the backbone's pre-trained weights, where a config names one
        self.chosen, self.kept, self.head_name = match.chosen, tuple(match.kept), backbone.head
        self.backbone = backbone.model
        self.tuning = nn.ModuleDict({name.replace(".", "_"): module for name, module in match.modules.items()})
        trained = set(match.trained)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in trained or backbone.in_head(name))
        self.tuning.requires_grad_(True)
        # So that a delta file can hold the buffers that training changes (running statistics of batch norms).
        self.initial_buffers = {f"backbone.{name}": buffer_digest(b) for name, b in self.backbone.named_buffers()}

    def forward(self, image: Tensor) -> Tensor:
        """Logits `(B, classes)` of `image` `(B, 3, H, W)`."""
        return self.backbone(image)

    def train(self, mode: bool = True) -> PetlModel:
        """Training mode; with `frozen_mode="eval"` of what the method adds alone."""
        super().train(mode)
        if self.frozen_mode == "eval":
            self.backbone.eval()
        return self

    def in_head(self, name: str) -> bool:
        """Whether a parameter of this name (`backbone....`) belongs to the classifier."""
        return bool(self.head_name) and name.startswith(f"backbone.{self.head_name}.")

    def delta_names(self, *, head: bool = True) -> list[str]:
        """Names of the parameters that make up the tuned network beside the backbone: trained, or kept from a stage."""
        kept = {f"backbone.{name}" for name in self.kept}
        return [
            name
            for name, parameter in self.named_parameters()
            if (parameter.requires_grad or name in kept) and (head or not self.in_head(name))
        ]


def inject(
    model: nn.Module,
    method: Method,
    *,
    num_classes: int | None = None,
    head_init: str = "trunc",
    frozen_mode: str = "train",
) -> PetlModel:
    """Puts a method into a network of timm, which is changed in place: frozen, with a new head and hooks.

    Args:
        model: a ViT, Swin or ConvNeXt, or one whose block was added to `petl.models.sites.ANATOMY`.
        method: e.g. ``petl.LoRA(rank=8)``.
        num_classes: of a new head; None keeps the network's.
        head_init: `trunc`, a truncated normal of deviation 0.02, or `zero`; biases are zero.
        frozen_mode: see `PetlModel`.

    Raises:
        petl.models.sites.NoSite: the network does not have what the method asks for; the message lists what it has.
        ValueError: a method is in the network already, or a wrong setting.
    """
    if isinstance(model, PetlModel) or any(_ours(module) for module in model.modules()):
        raise ValueError("there is a method in this network already: begin with a fresh one, or use petl.Together")
    if head_init not in HEAD_INITS:
        raise ValueError(f"head_init='{head_init}' is none of {list(HEAD_INITS)}")
    if num_classes is not None:
        model.reset_classifier(num_classes)
        for layer in model.get_classifier().modules():
            if isinstance(layer, nn.Linear):
                if head_init == "zero":
                    nn.init.zeros_(layer.weight)
                else:
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
    backbone = Backbone.of(model)
    return PetlModel(backbone, method, method.match(backbone), frozen_mode)


def _ours(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(type(getattr(hook, "__self__", None)).__module__.startswith("petl.models") for hook in hooks)


def buffer_digest(value: Tensor) -> str:
    """A short fingerprint of a buffer's numbers; of one on the meta device, of its shape."""
    if value.is_meta:
        return f"meta {tuple(value.shape)}"
    numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------ what there is
def _delta(model: PetlModel, head: bool) -> Iterator[tuple[str, nn.Parameter]]:
    names = set(model.delta_names(head=head))
    return ((name, parameter) for name, parameter in model.named_parameters() if name in names)


def trainable_parameters(model: PetlModel, *, head: bool = False) -> int:
    """Numbers that are trained now, without the head unless it is asked for (as the field's tables count)."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (head or not model.in_head(name))
    )


def delta_parameters(model: PetlModel, *, head: bool = False) -> int:
    """Numbers in which the tuned network differs from its backbone: those of all stages (TTC's LayerNorms included)."""
    return sum(parameter.numel() for _, parameter in _delta(model, head))


def parameter_table(model: PetlModel) -> list[dict[str, Any]]:
    """One row for every place (`name`, `kind`, `parameters`, `trained`), for the backbone's own modules, and the head.

    The rows add up to `delta_parameters(model, head=True)`.
    """
    rows: list[dict[str, Any]] = []
    for name, module in model.tuning.items():
        count = sum(p.numel() for p in module.parameters())
        rows.append({"name": name, "kind": type(module).__name__, "parameters": count, "trained": True})
    own: dict[tuple[str, str], list[int]] = {}
    for name, parameter in _delta(model, True):
        if name.startswith("backbone."):
            parent = model.get_submodule(name.rpartition(".")[0])
            kind = "head" if model.in_head(name) else type(parent).__name__
            place = model.head_name if kind == "head" else name.removeprefix("backbone.").rpartition(".")[0]
            entry = own.setdefault((place, kind), [0, 0])
            entry[0] += parameter.numel()
            entry[1] |= int(parameter.requires_grad)
    for (place, kind), (count, trained) in own.items():
        rows.append({"name": place, "kind": kind, "parameters": count, "trained": bool(trained)})
    return rows


def describe(model: PetlModel) -> str:
    """What the method matched, as text: kinds of places with their number and size, and the sums. Prints nothing."""
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for row in parameter_table(model):
        kind = row["kind"] if row["trained"] else f"{row['kind']} (kept)"
        kinds[kind] += 1
        sizes[kind] += row["parameters"]
    total = sum(p.numel() for name, p in model.backbone.named_parameters() if not model.in_head(f"backbone.{name}"))
    lines = [f"{model.method!r} in {type(model.backbone).__name__}"]
    lines += [f"  {kinds[kind]:4d} x {kind}: {sizes[kind]:,} parameters" for kind in kinds]
    count = delta_parameters(model)
    lines.append(f"  without the head {count:,} of {total:,} ({100 * count / max(total, 1):.3f} %)")
    start = "equals the frozen network at first" if starts_as_backbone(model.method) else "differs from it at first"
    return "\n".join([*lines, f"  {start}" + ("" if model.chosen else "; its channels are yet to be chosen")])


def percentage(model: PetlModel) -> float:
    """`delta_parameters` as percentage of the backbone's parameters."""
    total = sum(p.numel() for name, p in model.backbone.named_parameters() if not model.in_head(f"backbone.{name}"))
    return 100 * delta_parameters(model) / total if total else math.nan
