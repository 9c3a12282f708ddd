"""A state dict that a paper has translated to its own names, held against a module: all of it fits, or all is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from core.errors import VitrineError

_COUNTER = "num_batches_tracked"


class CheckpointMismatch(VitrineError, ValueError):
    """A state dict does not fit: the message lists every missing, unexpected and misshapen entry."""


def report(
    headline: str, missing: Iterable[str] = (), unexpected: Iterable[str] = (), shapes: Iterable[str] = ()
) -> str:
    """A headline and the names below it."""
    lines = [headline]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
        names = list(names)
        lines += [f"  {title}:"] + [f"    {name}" for name in names] if names else []
    return "\n".join(lines)


def fit(
    state: Mapping[str, Tensor], target: nn.Module, hint: str = "", own: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """`state` when it is exactly what `target` holds; counters of batch norm that it lacks are the target's.

    Args:
        state: name to tensor.
        target: the module that is to be loaded.
        hint: goes into the headline of the error.
        own: what the target holds, where that is not all of its state dict.

    Raises:
        CheckpointMismatch: it is not.
    """
    own = target.state_dict() if own is None else own
    lacking = [name for name in own if name not in state]
    counters = {name: own[name] for name in lacking if name.endswith(_COUNTER) and not own[name].is_meta}
    missing = [name for name in lacking if not name.endswith(_COUNTER)]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name}: {tuple(value.shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        headline = f"the state dict does not fit {type(target).__name__}" + (f" ({hint})" if hint else "")
        raise CheckpointMismatch(report(headline, missing, unexpected, shapes))
    return {**state, **counters}
