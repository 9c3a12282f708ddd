"""Command lines of the tools: ``key=value`` options of a dataclass, and Hydra overrides beside them.

Imports nothing heavy, so that every tool answers ``--help`` at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from core.config.command.console import prose, wrapped
from core.config.command.messages import first_process, first_process_speaks
from core.config.command.signals import Interrupted, StopRequest
from core.config.key import TRACEBACK
from core.errors import ConfigError, VitrineError, close_names

T = TypeVar("T")

_TRUE = ("true", "yes", "1", "on")
_FALSE = ("false", "no", "0", "off")


def parse(
    argv: list[str], options: type[T], *, doc: str, positional: str | None = None, overrides: bool = False
) -> tuple[T, list[str]]:
    """Fills the dataclass `options` from a command line.

    ``key=value``, ``--key=value``, ``--key value`` and ``--flag`` are the same thing. ``--help`` prints `doc` and the
    options with their defaults, then exits.

    Args:
        argv: the command line without the program's name.
        options: a dataclass with typed fields (str, int, float, bool, list[...] as commas, ``X | None``).
        doc: the tool's teaching text.
        positional: the field that a bare word fills.
        overrides: hand items that are no option back as Hydra overrides instead of refusing them.

    Returns:
        The filled dataclass and the remaining overrides.

    Raises:
        ConfigError: unknown option (with the nearest existing ones), missing or malformed value.
    """
    if any(word in ("--help", "-h") for word in argv):
        print(_help(options, doc))
        raise SystemExit(0)
    hints = typing.get_type_hints(options)
    fields = {f.name: f for f in dataclasses.fields(options)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    rest: list[str] = []
    for word in _normalised(argv, hints):
        key, equals, value = word.partition("=")
        if equals and key in fields:
            given[key] = _convert(value, hints[key], key)
        elif not equals and positional and positional not in given and not word.startswith(("-", "+", "~")):
            given[positional] = _convert(word, hints[positional], positional)
        elif overrides and (equals or word.startswith("~")):
            rest.append(word)
        else:
            near = close_names(key.lstrip("-"), fields)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"unknown option '{word}'{hint} (options: {', '.join(fields)}; --help explains)")
    missing = [
        name
        for name, f in fields.items()
        if name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        near = [w for w in rest if close_names(w.lstrip("+~").partition("=")[0], missing, cutoff=0.6)]
        hint = f"; perhaps meant by '{near[0]}'" if near else ""
        raise ConfigError(f"missing: {', '.join(f'{name}=...' for name in missing)}{hint} (--help explains)")
    return options(**given), rest


def run(main: Callable[[list[str]], None]) -> None:
    """Calls a tool's `main` with the command line.

    The project's own errors end it with one clear message and status 2. So do Ctrl-C and SIGTERM, at any moment: the
    work is not done, but nothing went wrong, and the message says what is kept.
    """
    first_process_speaks()
    try:
        with StopRequest("stopped before it was done"):
            try:
                main(sys.argv[1:])
            finally:
                sys.stdout.flush()
    except VitrineError as error:
        stop(error)
    except BrokenPipeError:  # the reader (`| head`) has seen enough; Python would complain when it flushes again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def stop(error: VitrineError) -> NoReturn:
    """Ends the program with the error's message, after its notes (a broken sample's note is where it broke).

    That a program was asked to stop is no error, and of several processes the first says it.
    """
    if isinstance(error, Interrupted):
        if first_process():
            print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if os.environ.get(TRACEBACK) not in (None, "", "0"):
        traceback.print_exception(error)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def _normalised(argv: list[str], hints: dict[str, Any]) -> list[str]:
    """``--key value`` and ``--flag`` as ``key=value``."""
    words, index = [], 0
    while index < len(argv):
        word = argv[index]
        name = word[2:].replace("-", "_")
        if word.startswith("--") and "=" in word:
            key, _, value = word[2:].partition("=")
            words.append(f"{key.replace('-', '_')}={value}")
        elif word.startswith("--") and name in hints:
            following = argv[index + 1] if index + 1 < len(argv) else None
            if _plain(hints[name]) is bool and following not in _TRUE + _FALSE:
                words.append(f"{name}=true")
            elif following is None:
                raise ConfigError(f"{word} needs a value")
            else:
                words.append(f"{name}={following}")
                index += 1
        else:
            words.append(word)
        index += 1
    return words


def _plain(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _convert(text: str, hint: Any, key: str) -> Any:
    if type(None) in typing.get_args(hint) and text.lower() in ("null", "none"):
        return None
    plain = _plain(hint)
    try:
        if plain is bool:
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        if typing.get_origin(plain) is list:
            item = typing.get_args(plain)[0]
            return [_convert(part.strip(), item, key) for part in text.strip("[]").split(",") if part.strip()]
        if typing.get_origin(plain) is typing.Literal:
            if text not in typing.get_args(plain):
                raise ConfigError(f"{key}={text}: choose one of {', '.join(map(str, typing.get_args(plain)))}")
            return text
        return plain(text)
    except ConfigError:
        raise
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={text}: not a valid {getattr(plain, '__name__', plain)}") from None


def _help(options: type, doc: str) -> str:
    lines = [prose(doc), "", "Options (key=value):"]
    hints = typing.get_type_hints(options)
    for f in dataclasses.fields(options):  # type: ignore[arg-type]
        if f.default is not dataclasses.MISSING:
            default = f" = {f.default}"
        elif f.default_factory is not dataclasses.MISSING:
            default = f" = {f.default_factory()}"
        else:
            default = " (required)"
        kind = str(getattr(hints[f.name], "__name__", hints[f.name])).replace("typing.", "")
        about = f.metadata.get("help", "")
        lines.append(wrapped(f"{f.name}: {kind}{default}" + (f"   {about}" if about else ""), None, "      ", "  "))
    return "\n".join(lines)
