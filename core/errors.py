"""Errors whose message is all that a user needs: tools print them without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class VitrineError(Exception):
    """Base of the errors that tools report as one clear message."""


class ConfigError(VitrineError, ValueError):
    """A config, an override or a command line that cannot be meant."""


def one_line(text: str, limit: int = 1200) -> str:
    """`text` without line breaks, control characters and lone surrogates; its middle is left out beyond `limit`."""
    text = text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    text = " ".join(line.strip() for line in text.splitlines())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few of several names, and how many more there are."""
    return ", ".join(one_line(str(name), 120) for name in names[:count]) + (
        f", ... ({len(names) - count} more)" if len(names) > count else ""
    )
