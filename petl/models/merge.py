"""A tuned network as a plain one: what can be folded into its weights, and what cannot (sections 2.4, 2.6)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from petl.models.channels import OutputTuning, QueryValueTuning
from petl.models.inject import PetlModel
from petl.models.methods.adapters import GroupedAdapter
from petl.models.methods.lowrank import Factorised, Factors, LowRank
from petl.models.methods.prompts import WithoutPrompts
from petl.models.methods.scale_shift import ScaleShift
from petl.models.sites import Backbone


@dataclass
class MergeReport:
    """What became of a merge.

    model: the backbone with the folded weights; modules that could not be folded are still called by hooks.
    folded: names of places whose module is now part of a weight.
    left: names of those that cannot be, with the reason.
    difference: largest absolute difference of the logits on `example`; None without one.
    """

    model: nn.Module
    folded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    difference: float | None = None


def merge(model: PetlModel, example: Tensor | None = None, *, half: bool = False) -> MergeReport:
    """Folds into the backbone's weights whatever is linear in them; computed in float32, `model` stays as it is.

    LoRA and FacT are added to their layer's weight, SSF scales it, RepAdapter and channels at `mlp` and `qv` are
    multiplied in. Tuned norms, biases and heads are the backbone's own weights anyway. Everything else stays: what is
    not linear (adapters), what adds tokens (prompts), and channels at `attn` and `block`, which change the residual
    stream, in front of which there is no single layer.

    Args:
        model: tuned.
        example: `(B, 3, H, W)`; logits of both networks are compared on it.
        half: fold half-precision weights (in float32, rounded at the end) instead of refusing them.

    Raises:
        ValueError: the weights are in half precision and `half` is not set.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not half and kinds & {torch.float16, torch.bfloat16}:
        raise ValueError(f"weights in {sorted(map(str, kinds))}: a merge rounds them; use half=True, or model.float()")
    tuned: PetlModel = copy.deepcopy(model).eval()
    backbone = Backbone.of(tuned.backbone)
    report = MergeReport(tuned.backbone)
    with torch.no_grad():
        for name, module in tuned.tuning.items():
            if isinstance(module, (Factors, WithoutPrompts)):
                continue
            hosts = _hosts(tuned.backbone, module)
            reason = _fold(backbone, module, hosts[0]) if hosts else "it is called by no module"
            if reason is None:
                _detach(tuned.backbone, module)
                report.folded.append(name)
            else:
                report.left[name] = reason
        tuned.backbone.eval()
        if example is not None:
            mode = model.training
            model.eval()
            report.difference = float((model(example) - report.model(example)).abs().max())
            model.train(mode)
    return report


def _hosts(backbone: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules of the backbone whose hooks are the tuning module's, in order."""
    return [host for host in backbone.modules() for hook in _hooks(host) if getattr(hook, "__self__", None) is module]


def _hooks(host: nn.Module) -> list[object]:
    return [*host._forward_hooks.values(), *host._forward_pre_hooks.values()]


def _detach(backbone: nn.Module, module: nn.Module) -> None:
    for host in backbone.modules():
        for hooks in (host._forward_hooks, host._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is module]:
                del hooks[key]


def _fold(backbone: Backbone, module: nn.Module, host: nn.Module) -> str | None:
    """Changes the host's weights by the module; or says why that cannot be done."""
    if isinstance(module, (LowRank, Factorised)):
        change, _ = module.matrix()
        _set(host.weight, host.weight.float() + change.float())
        return None
    if isinstance(module, ScaleShift):
        return _fold_scale(module, host)
    if isinstance(module, GroupedAdapter):  # W (z + P z + p) + b
        product, shift = (value.float() for value in module.matrix())
        weight = host.weight.float()
        _set_bias(host, weight @ shift)
        _set(host.weight, weight + weight @ product)
        return None
    if isinstance(module, (OutputTuning, QueryValueTuning)):
        tunings = [module.tuning] if isinstance(module, OutputTuning) else [module.query, module.value]
        if any(tuning.form == "mlp" for tuning in tunings):
            return "an MLP on the channels is not linear"
        if isinstance(module, QueryValueTuning):
            return _fold_rows(host, [module.query.matrix(), None, module.value.matrix()])
        layer = next((b.fc2.module for b in backbone.blocks if b.mlp.module is host), None)
        if layer is None:
            return "it changes the residual stream, in front of which there is no single layer"
        return _fold_rows(layer, [module.tuning.matrix()])
    return f"{type(module).__name__} is not a linear change of one layer"


def _fold_rows(layer: nn.Module, maps: list[tuple[Tensor, Tensor] | None]) -> str | None:
    """``(I + P) (W x + b) + p`` for every equal part of the layer's outputs."""
    shape = layer.weight.shape
    weights = list(layer.weight.float().flatten(1).chunk(len(maps)))
    biases = list((layer.bias if layer.bias is not None else layer.weight.new_zeros(shape[0])).float().chunk(len(maps)))
    if layer.bias is None and any(m is not None and m[1].any() for m in maps):
        return "its layer has no bias to take the shift"
    for index, affine in enumerate(maps):
        if affine is not None:
            product, shift = (value.float() for value in affine)
            weights[index] = weights[index] + product @ weights[index]
            biases[index] = biases[index] + product @ biases[index] + shift
    _set(layer.weight, torch.cat(weights).view(shape))
    if layer.bias is not None:
        _set(layer.bias, torch.cat(biases))
    return None


def _fold_scale(module: ScaleShift, host: nn.Module) -> str | None:
    """``a (W x + b) + c``; of a norm, into its own scale and shift."""
    if getattr(host, "weight", None) is None or host.bias is None:
        return f"{type(host).__name__} has no scale and shift of its own to take these"
    scale, shift = module.scale.float(), module.shift.float()
    _set(host.weight, host.weight.float() * scale.view(-1, *[1] * (host.weight.ndim - 1)))
    _set(host.bias, host.bias.float() * scale + shift)
    return None


def _set_bias(host: nn.Module, change: Tensor) -> None:
    if host.bias is None:
        host.bias = nn.Parameter(change.to(host.weight.dtype), requires_grad=False)
    else:
        _set(host.bias, host.bias.float() + change)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
