"""Where in a model a state dict belongs: the whole model, its network, or the one other part that it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from core.checkpoint import StateDiff, diff_state
from core.errors import ConfigError, nearest

# A counter of batch norms that no result depends on; converters leave it out.
COUNTERS = "*num_batches_tracked"
# What wrappers put in front of every name: always, and where nothing fits as it is.
_WRAPPERS = ("module.", "_orig_mod.")
_HOLDERS = ("model.", "backbone.", "encoder.", "network.", "net.")


def holder(model: nn.Module) -> nn.Module:
    """The module whose names a state dict has: a detector's own, not those of its wrapper."""
    return getattr(model, "named_by", None) or model


def join(into: str, name: str) -> str:
    """The name in the whole model of an entry of one of its parts ("": the whole model)."""
    return f"{into}.{name}" if into else name


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A part of a model.

    Raises:
        ConfigError: there is none of that name; near names are in the message.
    """

    model = holder(model)
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in model.named_modules() if known]
        near = nearest(name, known) or f" (there are: {', '.join(name for name, _ in model.named_children())})"
        raise ConfigError(f"into={name}: {type(model).__name__} has no submodule '{name}'{near}") from None


def network_name(model: nn.Module) -> str | None:
    """The name of a model's `inference_network()`: what a bare file of weights most likely is. None: it has none."""
    if not hasattr(model, "inference_network"):
        return None
    try:
        network = model.inference_network()
    except ConfigError:  # several networks, none of which stands out
        return None
    return next((name for name, module in holder(model).named_modules() if module is network), None)


def place(
    model: nn.Module, state: dict[str, Any], tolerated: Sequence[str] = (), strict: bool = True
) -> tuple[str, dict[str, Any]]:
    """The part of a model that a state dict belongs to.

    It is the whole model if that fits; else the part that does, `inference_network()` before all others; else, for the
    list of differences or for what fits of it, the part with the most names in common.

    Args:
        model: a trainer, one of mmdet's detectors, or any module; its tensors may be on "meta".
        state: names -> tensors.
        tolerated: patterns of names that need not find a match.
        strict: False: a part of it is enough.

    Returns:
        The part's name ("": the whole model), and the state dict without a wrapper's prefix (``module.``,
        ``model.``, ...).

    Raises:
        ConfigError: it belongs to several.
    """
    whole, tolerated = holder(model), (*tolerated, COUNTERS)
    if _exact(whole, "", state, tolerated):
        return "", state
    for prefix in _WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            return place(model, {name[len(prefix) :]: value for name, value in state.items()}, tolerated, strict)
    preferred, names = network_name(model), _nearest_parts(whole, state)
    exact = [name for name in names if _exact(whole, name, state, tolerated)]
    for prefix in _HOLDERS:
        if state and not exact and all(name.startswith(prefix) for name in state):
            into, inner = place(model, {name[len(prefix) :]: v for name, v in state.items()}, tolerated, False)
            if _exact(whole, into, inner, tolerated):
                return into, inner
    chosen = exact or names
    if preferred in chosen or not chosen:
        return preferred or "", state
    if not exact and "" in chosen:
        return "", state
    if len(chosen) == 1 or (not exact and strict):  # without a fit, the error lists the differences
        return chosen[0], state
    parts = ", ".join(chosen[:8]) + (", ..." if len(chosen) > 8 else "")
    raise ConfigError(f"the weights fit {len(chosen)} parts of {type(whole).__name__}: choose with into= ({parts})")


def fits(model: nn.Module, state: dict[str, Any]) -> bool:
    """Whether a state dict is exactly that of a model (which may be on "meta") or of a part of it."""
    try:
        into, state = place(model, state)
    except ConfigError:  # of several
        return True
    return _exact(holder(model), into, state, (COUNTERS,))


def as_built(model: nn.Module, loaded: set[str]) -> str:
    """The parts of a model with parameters that are not among the names `loaded`, for a message; "" when all are."""
    left: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, _ in holder(model).named_parameters():
        child = name.partition(".")[0]
        total[child] += 1
        left[child] += name not in loaded
    return ", ".join(
        child if count == total[child] else f"{child} ({count} of {total[child]} parameters)"
        for child, count in left.items()
        if count
    )


def mismatch(
    name: str, own: Mapping[str, Any], state: Mapping[str, Any], diff: StateDiff, tolerated: Sequence[str]
) -> str:
    """What to say of weights that do not fit: the prefix under which they would, or the differences.

    Args:
        name: of the model or its part.
        own: its state dict.
        state: the weights.
        diff: how they differ, without what is tolerated.
        tolerated: patterns of names that need not find a match.
    """
    first = f".{next(iter(own), '')}"
    for prefix in sorted({other[: 1 - len(first)] for other in state if other.endswith(first)}, key=len):
        inside = {other[len(prefix) :]: value for other, value in state.items() if other.startswith(prefix)}
        if not diff_state(own, inside).without(tolerated):
            return f"does not fit {name} as it is; nothing was loaded. prefix={prefix} takes the part that does"
    return (
        f"does not fit {name}; nothing was loaded. (into=SUBMODULE and prefix=NAMES. say what goes where, "
        f"ignore=PATTERN what may differ; strict=false loads what fits.)\n{diff}"
    )


def entries(model: nn.Module, into: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a model holds: its own state dict, or that part of the model's, which may leave out what is frozen
    and comes from elsewhere; the one that differs less from `state`.
    """
    whole = holder(model)
    own = whole.get_submodule(into).state_dict()
    kept = {name[len(into) + 1 :]: value for name, value in whole.state_dict().items() if name.startswith(f"{into}.")}
    if not into or kept.keys() == own.keys():
        return own
    missing = (len(diff_state(own, state).missing), len(diff_state(kept, state).missing))
    return own if missing[0] <= missing[1] or any(name in own and name not in kept for name in state) else kept


def _exact(whole: nn.Module, name: str, state: Mapping[str, Any], tolerated: Sequence[str]) -> bool:
    own = entries(whole, name, state)
    return any(key in own for key in state) and not diff_state(own, state).without(tolerated)


def _nearest_parts(whole: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of the modules that share the most entries with a state dict: by name and shape, then by name."""
    own = whole.state_dict()
    places: dict[str, list[str]] = {}
    for name in own:
        parts = name.split(".")
        for depth in range(len(parts)):
            places.setdefault(".".join(parts[depth:]), []).append(".".join(parts[:depth]))
    by_shape: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for name, value in state.items():
        for part in places.get(name, ()):
            by_name[part] += 1
            by_shape[part] += getattr(own[join(part, name)], "shape", None) == getattr(value, "shape", None)
    best = max(((by_shape[part], by_name[part]) for part in by_name), default=None)
    modules = {name for name, _ in whole.named_modules()}
    return [part for part in by_name if (by_shape[part], by_name[part]) == best and part in modules]
