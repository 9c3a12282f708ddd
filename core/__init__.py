"""The engine: config, registries, launcher, data, metrics and tools. Nothing in it names a paper."""

from __future__ import annotations

import importlib
from typing import Any

# Exported name -> module that defines it. Loaded on first use, so that `import core` costs nothing.
_EXPORTS = {
    "Trainer": "core.trainer",
    "Runner": "core.runner",
    "TrainLoop": "core.loop",
    "EvalLoop": "core.loop",
    "OptimWrapper": "core.optim",
    "OptimConstructor": "core.param_groups",
    "Schedule": "core.schedules",
    "OptimWrapperDict": "core.optim",
    "EMA": "core.ema",
    "AveragedNetwork": "core.ema",
    "EMAHook": "core.hooks.ema",
    "LoggingHook": "core.hooks.logging",
    "MediaHook": "core.hooks.media",
    "CheckpointHook": "core.hooks.checkpoint",
    "JsonLines": "core.visualization",
    "TensorBoard": "core.visualization",
    "Wandb": "core.visualization",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'core' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
