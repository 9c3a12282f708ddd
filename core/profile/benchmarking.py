"""What the scripts in `benchmarks/` share: the parts that are asked for, and figures with what they were taken on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from core.errors import ConfigError, nearest
from core.profile.measure import device_name


def measure(parts: Mapping[str, Callable[[Any], Any]], options: Any) -> dict[str, Any]:
    """The figures of each of `options.parts`, which `parts` measures.

    Raises:
        ConfigError: a part that there is not; nothing has been measured then.
    """
    for name in options.parts:
        if name not in parts:
            raise ConfigError(f"parts: no '{name}'{nearest(name, parts)} (there are: {', '.join(parts)})")
    return {name: parts[name](options) for name in options.parts}


def conditions(script: str, argv: list[str], options: Any) -> dict[str, Any]:
    """What a reader needs to repeat figures: threads, command, and device (PyTorch's version where there is no choice).

    Args:
        script: its `__file__`.
        argv: its command line; where the output went is left out.
        options: with `threads`, and `device` where there is a choice.
    """
    words = [word for word in argv if not word.removeprefix("--").startswith("output=")]
    device = getattr(options, "device", None)
    return {
        "threads": options.threads,
        **({"device": device_name(device)} if device else {"torch": torch.__version__}),
        "command": " ".join([f"python benchmarks/{Path(script).name}", *words]),
    }


def publish(figures: Mapping[str, Any], output: str | None, shown: Mapping[str, Any] | None = None) -> None:
    """Prints figures as JSON, or those `shown`, and writes them all to the file `output` where one is given."""
    print(json.dumps(figures if shown is None else shown, indent=1), flush=True)
    if output:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
