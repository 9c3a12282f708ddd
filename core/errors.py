"""Errors whose message is all that a user needs: tools print them without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class VitrineError(Exception):
    """Base of the errors that tools report as one clear message."""


class ConfigError(VitrineError, ValueError):
    """A config, an override or a command line that cannot be meant."""


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few of several names, and how many more there are."""
    return ", ".join(names[:count]) + (f", ... ({len(names) - count} more)" if len(names) > count else "")
