"""``tools/train.py rerun=RUN key=value ...``: a run's stored config trains again, with overrides laid over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import ConfigError

KEY = "rerun="


def asked(words: list[str]) -> bool:
    """Whether a command line names a run whose config it wants."""
    return any(word.startswith(KEY) for word in words)


def rerun_config(flags: list[str], words: list[str], config_dir: str | None = None) -> dict[str, Any]:
    """The config of the run that ``rerun=`` names, for a run of its own in a new folder.

    A resolved config has no interpolations: an override changes the key that it names, and nothing else.

    Args:
        flags: of the command line, besides ``--config-dir``.
        words: ``rerun=RUN`` and overrides.
        config_dir: see `core.config.composition.compose`.

    Raises:
        ConfigError: no run's folder; ``experiment=`` beside it; a flag; an override of a key that does not exist.
    """
    from core.engine.run.config import is_sweep, laid_over, stored_config

    run = Path(next(word for word in words if word.startswith(KEY)).removeprefix(KEY))
    overrides = [word for word in words if not word.startswith(KEY)]
    several = [*flags, *(word for word in overrides if is_sweep(word))]
    if several:
        raise ConfigError(f"{several[0]} does not go together with rerun=: one command trains one run again")
    for word in overrides:
        if word.lstrip("+").startswith(("experiment=", KEY)):
            raise ConfigError(f"{word} stands beside rerun={run}, which is the config already: give one of them")
    stored = stored_config(run)
    if stored is None:
        raise ConfigError(f"rerun={run}: no run's folder with a config.yaml, e.g. runs/PAPER/NAME/latest")
    return laid_over(stored, overrides, config_dir, options=("rerun",))
