"""Which parameter gets which learning rate and weight decay, and from which optimizer.

Pure functions of ``(name, parameter)`` pairs make the groups; `OptimConstructor` applies them to a config.

A *pattern* names parameters: ``pos_embed`` or ``blocks.0.attn`` match where that run of name components occurs,
a pattern with ``*``, ``?`` or ``[`` is matched against the whole name as in a shell.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper as _OptimWrapper
from torch import nn
from torch.optim import Optimizer

from core.config.key import config_key
from core.config.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    check_arguments,
    resolve,
)
from core.errors import ConfigError, nearest
from core.optim.wrapper import OptimWrapper, OptimWrapperDict
from core.trainer import unwrap

NamedParameters = Iterable[tuple[str, nn.Parameter]]

_PARAMWISE = ("no_decay", "layer_decay", "multipliers", "groups")
_NO_DECAY = ("ndim_max", "bias", "norm", "model", "names", "exempt")
_MULTIPLIERS = ("lr", "weight_decay")
_NORM_CLASS = re.compile(r"(Layer|Batch|Group|Instance|Local|RMS|Rms)Norm")
# Wrappers inside a model that lengthen parameter names.
_WRAPPED = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name fits a pattern (see the module's docstring)."""
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def split_decay(
    named_parameters: NamedParameters,
    *,
    ndim_max: int | None = 1,
    bias: bool = True,
    names: Sequence[str] = (),
    also: Collection[str] = (),
    exempt: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Names of the parameters with and without weight decay, in the given order.

    Args:
        named_parameters: (name, parameter) pairs.
        ndim_max: parameters of at most that many axes are not decayed; None for no such rule.
        bias: parameters called ``bias`` are not decayed.
        names: patterns of parameters that are not decayed.
        also: exact names that are not decayed (e.g. `norm_parameters(model)`).
        exempt: patterns of parameters that are decayed whatever the other rules say.
    """
    decayed, plain = [], []
    for name, parameter in named_parameters:
        small = ndim_max is not None and parameter.ndim <= ndim_max
        is_bias = bias and name.rpartition(".")[2] == "bias"
        rule = small or is_bias or name in also or any(matches(name, p) for p in names)
        spared = rule and not any(matches(name, p) for p in exempt)
        (plain if spared else decayed).append(name)
    return decayed, plain


def norm_parameters(model: nn.Module) -> set[str]:
    """Names of all parameters owned by normalisation layers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if _NORM_CLASS.search(type(module).__name__)
        for name, _ in module.named_parameters(recurse=False)
    }


def vit_layer_ids(
    names: Iterable[str],
    *,
    depth: int | None = None,
    stem: Sequence[str] = ("cls_token", "pos_embed", "patch_embed"),
    blocks: str = "blocks",
) -> dict[str, int]:
    """Layer numbers of a plain ViT (BEiT, MAE): stem 0, block i -> i + 1, everything else depth + 1.

    Args:
        names: parameter names, relative to the ViT.
        depth: number of blocks; counted from the names when None.
        stem: patterns of what comes before the blocks.
        blocks: name of the list of blocks.
    """
    names = list(names)
    block = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    number = {name: int(found[1]) for name in names if (found := block.match(name))}
    last = (max(number.values(), default=-1) + 1 if depth is None else depth) + 1
    return {
        name: number[name] + 1 if name in number else 0 if any(matches(name, p) for p in stem) else last
        for name in names
    }


def layer_scales(layer_ids: Mapping[str, int], decay: float) -> dict[str, float]:
    """Learning-rate factors ``decay ** (last - id)``; `last` is the largest id."""
    last = max(layer_ids.values())
    return {name: decay ** (last - layer) for name, layer in layer_ids.items()}


def parameter_groups(
    named_parameters: NamedParameters,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    no_decay: Collection[str] = (),
    lr_scales: Mapping[str, float] | None = None,
    multipliers: Mapping[str, Mapping[str, float]] | None = None,
    tags: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: parameters with equal tag, learning rate and weight decay lie together, in model order.

    Args:
        named_parameters: (name, parameter) pairs, each parameter once.
        lr: base learning rate; groups carry ``lr = lr * lr_scale`` when it is given.
        weight_decay: base weight decay; groups carry none when it is None.
        no_decay: exact names without weight decay.
        lr_scales: factor by exact name (layer decay); 1 where it is silent.
        multipliers: ``{pattern: {lr: factor, weight_decay: factor}}``; all matching patterns are multiplied together.
        tags: ``{tag: patterns}`` keeps these apart from equal groups, so that a schedule can address them.

    Returns:
        dicts with ``name, tag, params, param_names, lr_scale`` and, when given above, ``lr, weight_decay``.

    Raises:
        ConfigError: a parameter has two tags.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        scale, decay = (lr_scales or {}).get(name, 1.0), weight_decay
        for pattern, factors in (multipliers or {}).items():
            if matches(name, pattern):
                scale *= factors.get("lr", 1.0)
                decay = None if decay is None else decay * factors.get("weight_decay", 1.0)
        if decay is not None and name in no_decay:
            decay = 0.0
        tag = _tag(name, tags or {})
        group = groups.setdefault((tag, scale, decay), _new_group(tag, scale, decay, lr))
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _tag(name: str, tags: Mapping[str, Sequence[str]]) -> str:
    found = [tag for tag, patterns in tags.items() if any(matches(name, p) for p in patterns)]
    if len(found) > 1:
        raise ConfigError(f"parameter '{name}' is in two of paramwise.groups: {found}")
    return found[0] if found else "default"


def _new_group(tag: str, scale: float, decay: float | None, lr: float | None) -> dict[str, Any]:
    name = tag + (f" lr x{scale:.4g}" if scale != 1 else "") + ("" if decay is None else f" decay {decay:.4g}")
    group: dict[str, Any] = {"name": name, "tag": tag, "params": [], "param_names": [], "lr_scale": scale}
    if lr is not None:
        group["lr"] = lr * scale
    if decay is not None:
        group["weight_decay"] = decay
    return group


def model_layer_scales(model: nn.Module, decay: float, ids: str | Callable | None = None) -> dict[str, float]:
    """Learning-rate factors of a model's parameters by name (without what torch.compile and the like put into names).

    Layer numbers come from `ids`, or from each outermost submodule that numbers its own parameters: by
    ``param_layer_ids() -> {name: id}`` or timm's ``group_matcher``. Parameters outside of these keep factor 1.

    Args:
        model: the trainer or a network.
        decay: factor per layer.
        ids: import path of a function ``f(model) -> {parameter name: id}``, or the function.

    Raises:
        ConfigError: nothing in the model numbers layers, or a parameter is left without a number.
    """
    if ids is not None:
        numbered = {"": dict(resolve(ids)(model))}
        if unknown := set(map(_clean, numbered[""])) - {_clean(n) for n, _ in model.named_parameters()}:
            raise ConfigError(f"layer_decay.ids '{ids}' numbers parameters that do not exist: {_few(unknown)}")
    else:
        numbered = {}
        for prefix, module in model.named_modules():
            inside = any(prefix.startswith(f"{outer}." if outer else "") for outer in numbered)
            if not inside and (found := _own_layer_ids(module, prefix)) is not None:
                numbered[prefix] = found
    if not numbered:
        raise ConfigError(
            "layer_decay: no module of the model has param_layer_ids() or timm's group_matcher(); "
            "name a function with layer_decay.ids (its argument is the model, its value {parameter name: layer})"
        )
    scales = {}
    for prefix, layer_ids in numbered.items():
        dot = f"{prefix}." if prefix else ""
        scales |= {_clean(dot + name): scale for name, scale in layer_scales(layer_ids, decay).items()}
    return scales


def _own_layer_ids(module: nn.Module, prefix: str) -> dict[str, int] | None:
    names = [_clean(name) for name, _ in module.named_parameters()]
    if hasattr(module, "param_layer_ids"):
        ids = dict(module.param_layer_ids())
    elif hasattr(module, "group_matcher"):
        from timm.models import group_parameters

        ids = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    else:
        return None
    ids = {_clean(name): layer for name, layer in ids.items()}
    if missing := set(names) - set(ids):
        raise ConfigError(f"layer_decay: {type(module).__name__} ('{prefix}') gives no layer to {_few(missing)}")
    return {name: ids[name] for name in names}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OptimConstructor:
    """Builds the optimizer wrapper(s) of a model from a config; mmengine's constructor interface.

    One optimizer::

        optim_wrapper:
          type: core.OptimWrapper
          precision: bf16
          optimizer: {type: torch.optim.AdamW, lr: 1e-3, weight_decay: 0.05}
          clip_grad: {max_norm: 5.0}
          paramwise:
            no_decay: {names: [relative_position_bias_table]}  # or true; see below
            layer_decay: 0.65                                  # or {decay: 0.65, ids: package.function}
            multipliers: {head: {lr: 10}}
            groups: {predictor: [score_predictor]}             # kept apart, for core.Schedule(groups=[predictor])

    Several, named; wrapper arguments beside the names (precision, accumulative_counts, ...) hold for all of them::

        optim_wrapper:
          constructor: core.OptimConstructor
          precision: fp16
          generator: {optimizer: {...}}                        # params default to the submodule of that name
          discriminator: {optimizer: {...}, params: [image_discriminator, video_discriminator]}

    ``params`` are submodule or parameter names from the model's root, or shell patterns of whole parameter names. The
    first form also serves a trainer that names several ``optimizer_parts``: each gets such an optimizer of its own.

    ``no_decay``: ndim_max (1; null for no rule), bias (true), norm (true: parameters of norm layers), model (true: what
    the networks name in timm's ``no_weight_decay()``), names (patterns), exempt (patterns decayed for all the rules).

    Frozen parameters are left out. Every parameter that requires a gradient must be in exactly one group.

    Args:
        optim_wrapper_cfg: as above; it is not changed.
        paramwise_cfg: another place for ``paramwise``, which mmengine uses.
        precision: of wrappers whose config names none.

    Raises:
        ConfigError: unknown keys; a pattern that matches nothing (with the nearest names); a parameter that requires a
            gradient in no group or in the groups of two optimizers; an optimizer without parameters.
    """

    def __init__(
        self,
        optim_wrapper_cfg: Mapping[str, Any],
        paramwise_cfg: Mapping[str, Any] | None = None,
        *,
        precision: str = "fp32",
    ) -> None:
        self.config: dict[str, Any] = _plain(optim_wrapper_cfg)
        self.precision = precision
        self.config.pop("constructor", None)
        if paramwise_cfg is not None:
            if "paramwise" in self.config:
                raise ConfigError("optim_wrapper has both paramwise and paramwise_cfg: keep paramwise")
            self.config["paramwise"] = _plain(paramwise_cfg)

    def __call__(self, model: nn.Module) -> _OptimWrapper:
        """The wrapper of one optimizer, or an `OptimWrapperDict`; `model` may be wrapped by DistributedDataParallel."""
        model = unwrap(model)
        parameters = _named(model)
        config = dict(self.config)
        if "optimizer" in config and (parts := getattr(model, "optimizer_parts", ())):
            shared = config.pop("optimizer")
            config |= {part: {"optimizer": shared} for part in parts}
        if "optimizer" in config:
            wrapper, taken = self._one(model, parameters, config, name="optim_wrapper")
            _check_assigned(parameters, {"optim_wrapper": taken})
            return wrapper
        named = {k: v for k, v in config.items() if isinstance(v, Mapping) and "optimizer" in v}
        shared = {k: v for k, v in config.items() if k not in named}
        if not named:
            raise ConfigError("optim_wrapper has no key 'optimizer', and no named entry with one")
        known = [*inspect.signature(OptimWrapper).parameters, "paramwise", "type"]
        for key in shared:
            if key not in known:
                raise ConfigError(
                    f"optim_wrapper.{key} is neither a wrapper's argument nor has it an 'optimizer'"
                    f"{nearest(key, known)}"
                )
        built, taken = {}, {}
        for name, own in named.items():
            whole = {"params": [name], **shared, **own}
            with config_key(name):
                built[name], taken[name] = self._one(model, parameters, whole, name=f"optim_wrapper.{name}")
        _check_assigned(parameters, taken)
        return OptimWrapperDict(**built)

    def _one(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], config: dict[str, Any], *, name: str
    ) -> tuple[_OptimWrapper, dict[str, nn.Parameter]]:
        chosen = _choose(parameters, config.pop("params", None), where=f"{name}.params")
        trained = {n: p for n, p in chosen.items() if p.requires_grad}
        if not trained:
            raise ConfigError(f"{name}: none of its {len(chosen)} parameters requires a gradient (see model.frozen)")
        optimizer_config = dict(config.pop("optimizer"))
        optimizer_class = resolve(optimizer_config.pop("type"), OPTIMIZERS)
        check_arguments(optimizer_class, optimizer_config, where=f"{name}.optimizer ({optimizer_class.__name__})")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in optimizer_config.items()}
        rules = config.pop("paramwise", None) or {}
        unique = _without_aliases(trained)
        groups = _groups(model, parameters, unique, rules, optimizer_class, options, where=f"{name}.paramwise")
        _report(name, groups, frozen=[n for n, p in chosen.items() if not p.requires_grad])
        named_groups = [{**g, "params": list(zip(g.pop("param_names"), g["params"], strict=True))} for g in groups]
        wrapper_class = resolve(config.pop("type", OptimWrapper), OPTIM_WRAPPERS)
        if issubclass(wrapper_class, OptimWrapper):
            config.setdefault("precision", self.precision)
        check_arguments(wrapper_class, config, where=f"{name} ({wrapper_class.__name__})")
        with config_key("optimizer"):
            optimizer = optimizer_class(named_groups, **options)
        return wrapper_class(optimizer=optimizer, **config), trained


def _groups(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    trained: Mapping[str, nn.Parameter],
    rules: Mapping[str, Any],
    optimizer_class: type[Optimizer],
    options: Mapping[str, Any],
    *,
    where: str,
) -> list[dict[str, Any]]:
    """The groups of one optimizer, by the `rules` of its paramwise config."""
    _check_keys(rules, _PARAMWISE, where)
    multipliers, tags = rules.get("multipliers") or {}, rules.get("groups") or {}
    for pattern, factors in multipliers.items():
        _check_keys(factors, _MULTIPLIERS, f"{where}.multipliers.{pattern}")
    _check_patterns(multipliers, parameters, f"{where}.multipliers")
    for tag, patterns in tags.items():
        _check_patterns(patterns, parameters, f"{where}.groups.{tag}")
    scales = None
    if (layer_decay := rules.get("layer_decay")) is not None:
        settings = dict(layer_decay) if isinstance(layer_decay, Mapping) else {"decay": layer_decay}
        _check_keys(settings, ("decay", "ids"), f"{where}.layer_decay")
        scales = model_layer_scales(model, **settings)
    defaults = inspect.signature(optimizer_class).parameters
    weight_decay = options.get("weight_decay", getattr(defaults.get("weight_decay"), "default", None))
    lr = options.get("lr", getattr(defaults.get("lr"), "default", None))
    return parameter_groups(
        trained.items(),
        lr=None if lr is None else float(lr),
        weight_decay=None if weight_decay is None else float(weight_decay),
        no_decay=_spared(model, parameters, rules.get("no_decay"), f"{where}.no_decay"),
        lr_scales=scales,
        multipliers=multipliers,
        tags=tags,
    )


def _spared(model: nn.Module, parameters: Mapping[str, nn.Parameter], rule: Any, where: str) -> set[str]:
    """Names without weight decay by the ``no_decay`` rule of a config."""
    if rule is None or rule is False:
        return set()
    rule = {} if rule is True else dict(rule)
    _check_keys(rule, _NO_DECAY, where)
    names, exempt = rule.get("names") or (), rule.get("exempt") or ()
    _check_patterns(names, parameters, f"{where}.names")
    _check_patterns(exempt, parameters, f"{where}.exempt")
    also = {_clean(n) for n in norm_parameters(model)} if rule.get("norm", True) else set()
    if rule.get("model", True):
        also |= _models_own(model, parameters)
    options = {"ndim_max": rule.get("ndim_max", 1), "bias": rule.get("bias", True)}
    return set(split_decay(parameters.items(), **options, names=names, also=also, exempt=exempt)[1])


def _models_own(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Parameters that the networks themselves name in ``no_weight_decay()`` (timm's convention)."""
    found = set()
    for prefix, module in model.named_modules():
        if callable(getattr(module, "no_weight_decay", None)):
            dot = f"{_clean(prefix + '.')}" if prefix else ""
            inside = [n for n in parameters if n.startswith(dot)]
            found |= {n for n in inside for p in module.no_weight_decay() if matches(n.removeprefix(dot), p)}
    return found


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, tied ones under each of their names."""
    return {_clean(n): p for n, p in model.named_parameters(remove_duplicate=False)}


def _without_aliases(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    first = {id(p): n for n, p in reversed(parameters.items())}
    return {n: p for n, p in parameters.items() if first[id(p)] == n}


def _choose(
    parameters: Mapping[str, nn.Parameter], params: str | Sequence[str] | None, *, where: str
) -> dict[str, nn.Parameter]:
    """The parameters of one optimizer: those below the named submodules, or that fit a shell pattern."""
    if params is None:
        return dict(parameters)
    patterns = [params] if isinstance(params, str) else list(params)

    def covers(pattern: str, name: str) -> bool:
        return fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else f"{name}.".startswith(f"{pattern}.")

    for pattern in patterns:
        if not any(covers(pattern, n) for n in parameters):
            raise ConfigError(f"{where}: '{pattern}' covers no parameter{nearest(pattern, _prefixes(parameters))}")
    return {n: p for n, p in parameters.items() if any(covers(pattern, n) for pattern in patterns)}


def _check_assigned(parameters: Mapping[str, nn.Parameter], taken: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    owners: dict[int, list[str]] = {}
    for optimizer, chosen in taken.items():
        for identity in {id(p) for p in chosen.values()}:
            owners.setdefault(identity, []).append(optimizer)
    twice = {n: owners[id(p)] for n, p in parameters.items() if len(owners.get(id(p), ())) > 1}
    if twice:
        name, optimizers = next(iter(twice.items()))
        raise ConfigError(f"{len(twice)} parameters belong to two optimizers, e.g. '{name}' to {optimizers}")
    orphans = [n for n, p in parameters.items() if p.requires_grad and id(p) not in owners]
    if orphans:
        raise ConfigError(
            f"no optimizer trains {_few(orphans)}: add them to the `params` of one of {list(taken)}, or freeze them "
            "(model.frozen, or requires_grad_(False) in the trainer)"
        )


def _check_patterns(patterns: Iterable[str], parameters: Mapping[str, nn.Parameter], where: str) -> None:
    for pattern in patterns:
        if not any(matches(n, pattern) for n in parameters):
            parts = {part for n in parameters for part in n.split(".")} | _prefixes(parameters)
            raise ConfigError(f"{where}: '{pattern}' matches no parameter{nearest(pattern, sorted(parts))}")


def _check_keys(config: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in config:
        if key not in known:
            raise ConfigError(f"{where} has no key '{key}'{nearest(key, known)}; it takes {list(known)}")


def _prefixes(names: Iterable[str]) -> set[str]:
    return {".".join(parts[: i + 1]) for n in names for parts in [n.split(".")] for i in range(len(parts))}


def _clean(name: str) -> str:
    return _WRAPPED.sub("", name)


def _report(name: str, groups: Sequence[Mapping[str, Any]], frozen: Sequence[str]) -> None:
    for group in groups:
        size = sum(p.numel() for p in group["params"])
        print_log(f"{name}: {len(group['params'])} tensors, {size:,} values: {group['name']}", logger="current")
    if frozen:
        print_log(f"{name}: {len(frozen)} frozen tensors left out: {_few(frozen)}", logger="current")


def _few(names: Iterable[str], count: int = 8) -> str:
    listed = sorted(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")


def _plain(value: Any) -> Any:
    """A deep copy of plain dicts and lists, whatever config classes they were."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
