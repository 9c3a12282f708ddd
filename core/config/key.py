"""Where in the config something failed: every error of what a config builds names the key that it stands under.

`config_key` marks a place, `constructed` calls what a config names. Between them an error gets the whole path, however
deep the thing is nested, and whoever builds it: ``model.network.norm``, ``stages.1.train_dataloader.dataset``.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from core.config.kinds import complaint, innermost, shown
from core.errors import ConfigError, VitrineError

TRACEBACK = "VITRINE_TRACEBACK"


@contextmanager
def config_key(key: str | None) -> Iterator[None]:
    """Everything that fails inside is a `ConfigError` under this key; an empty key adds nothing to the path.

    Errors of the project other than ConfigError, and packages that fail while they are imported, pass as they are.
    """
    try:
        yield
    except ConfigError as error:
        error.within(key)
        raise
    except (ImportError, VitrineError):
        raise
    except Exception as error:
        raise _failure(error).within(key) from error


def constructed(target: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> Any:
    """``target(**arguments)``, whose failure says what was called with what, and where in the code it failed.

    Raises:
        ConfigError: the constructor failed; the original error is its cause.
    """
    try:
        return target(**arguments)
    except VitrineError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={shown(value, 40)}" for key, value in arguments.items())
        raise _failure(error, f"{name}({given}) failed: ") from error


def unsuited(value: Any, hint: Any, owner: str = "it") -> ConfigError:
    """The error of a value that does not suit a hint, at the place of the part that does not."""
    place, part, wanted = innermost(value, hint)
    return ConfigError(complaint(part, wanted, owner)).within(place)


def _failure(error: Exception, what: str = "") -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[0] if lines else ''}".removesuffix(": ")
    return ConfigError(f"{what}{message} ({_place(error)}{TRACEBACK}=1 shows the traceback)")


def _place(error: Exception) -> str:
    """Where an error arose: the innermost line, and the innermost one outside of installed packages."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    if not frames:  # the call itself failed: an argument is missing
        return ""
    own = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    places = dict.fromkeys(f"{_short(frame.filename)}:{frame.lineno}" for frame in (own, frames[-1]))
    return ", in ".join(places) + "; "


def _short(path: str) -> str:
    """A file's path from its package on."""
    marker = f"site-packages{os.sep}"
    if marker in path:
        return path.rpartition(marker)[2]
    return os.sep.join(path.split(os.sep)[-2:])
