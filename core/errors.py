"""Errors whose message is all that a user needs: tools print them without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


class VitrineError(Exception):
    """Base of the errors that tools report as one clear message."""


class ConfigError(VitrineError, ValueError):
    """A config, an override or a command line that cannot be meant.

    Attributes:
        config_key: the place in the config, e.g. ``model.network``; empty where it is not known, or not in a config.
    """

    config_key = ""

    def within(self, key: str | None) -> ConfigError:
        """This error with `key` in front of its place; called from inside outwards as it leaves what is nested."""
        self.config_key = ".".join(part for part in (key, self.config_key) if part)
        return self

    def __str__(self) -> str:
        text = super().__str__()
        named = re.split(r"[\s:=]", text, maxsplit=1)[0]  # a message may begin with the key itself
        if not self.config_key or f"{named}.".startswith(f"{self.config_key}."):
            return text
        return f"config key '{self.config_key}': {text}"


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


class MissingDataError(VitrineError, FileNotFoundError):
    """Data that the config points to is not there, or not laid out as expected."""


class DataFileError(VitrineError, OSError, ValueError):
    """A file or folder of a data set that is there, but cannot be read as what it should be: damaged, of another
    kind or encoding, or without the right to read it. The message names it and the remedy."""


def close_names(name: str, choices: Iterable[str], count: int = 2, cutoff: float = 0.5) -> list[str]:
    """Those of some names that are spelled like one, the closest first: what a mistaken one may have meant.

    Args:
        name: as it was given.
        choices: the names that there are.
        count: at most so many.
        cutoff: how like they have to be, from 0 (anything) to 1 (the same).
    """
    import difflib

    return difflib.get_close_matches(str(name), list(choices), n=count, cutoff=cutoff)


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """`": did you mean 'a' or 'b'?"`, or the empty string when nothing comes close."""
    close = close_names(name, choices, count)
    return f": did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
