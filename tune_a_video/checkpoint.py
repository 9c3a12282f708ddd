"""State dicts of the released code to ours and back. The names are the same; what differs is what files hold of them.

Layouts that are read, with or without the prefixes `module.` (DataParallel) and `unet.` or `network.`:

- a whole tuned network: `unet/diffusion_pytorch_model.bin` of a released folder, `pytorch_model.bin` of an accelerate
  state folder, our own;
- the trained tensors alone: `tuneavideo-<step>.pth` of the LOVEU-TGVE fork, our deltas (`target=delta`).

Whole folders are read by `TuneAVideoPipeline.from_official`. Every function is strict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from core.errors import VitrineError
from tune_a_video.models import TRAINABLE_MODULES
from tune_a_video.models.inflation import TEMPORAL_NAMES

State = dict[str, Tensor]

TARGETS = ("network", "delta")
LAYOUTS = ("official", "delta", "image")
_PREFIXES = ("module.", "unet.", "network.")


class CheckpointMismatch(VitrineError, ValueError):
    """A state dict does not fit: the message lists every missing, unexpected and misshapen entry."""


def convert(state: Mapping[str, Tensor], target: nn.Module | str | None = None) -> State:
    """Translate a state dict of the released code to our names.

    Args:
        state: name to tensor.
        target: the module that is to be loaded (the network or one of its blocks); `network`, a whole network of any
            size; `delta`, some of its tensors. None: whatever is there.

    Returns:
        A new dict with the same tensors; for a module, all of its entries.

    Raises:
        CheckpointMismatch: entries are missing, left over or of another shape.
        ValueError: unknown target.
    """
    if isinstance(target, str) and target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: use {', '.join(TARGETS)} or pass the module to be loaded")
    ours = dict(state)
    for prefix in _PREFIXES:
        if ours and all(name.startswith(prefix) for name in ours):
            ours = {name.removeprefix(prefix): value for name, value in ours.items()}
    if target == "network":
        missing = [name for name in ("conv_in.weight", "conv_out.weight") if name not in ours]
        missing += [f"*.{name}.*" for name in TEMPORAL_NAMES if not any(name in key for key in ours)]
        if missing:
            raise CheckpointMismatch(f"no whole tuned network: it lacks {', '.join(missing)}")
    if isinstance(target, nn.Module):
        _fit(ours, target)
    return ours


def revert(
    state: Mapping[str, Tensor], *, layout: str = "official", modules: Sequence[str] = TRAINABLE_MODULES
) -> State:
    """Translate our state dict back.

    Args:
        state: name to tensor.
        layout: `official`, the whole network; `delta`, what the LOVEU-TGVE fork keeps, tensors of trained modules;
            `image`, the image model's tensors.
        modules: names of trained modules, for `delta`.

    Raises:
        ValueError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: use {', '.join(LAYOUTS)}")
    ours = convert(state)
    if layout == "delta":
        return {name: value for name, value in ours.items() if any(part in name for part in modules)}
    if layout == "image":
        return {name: value for name, value in ours.items() if not any(part in name for part in TEMPORAL_NAMES)}
    return ours


def _fit(state: Mapping[str, Tensor], module: nn.Module) -> None:
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        text = "; ".join(f"{name}: {', '.join(entries)}" for name, entries in lists.items() if entries)
        raise CheckpointMismatch(f"the state dict does not fit {type(module).__name__}: {text}")
