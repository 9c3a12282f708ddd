"""Preparation of data sets: small commands that bring files into the layout which a reader expects.

A paper offers a module ``<paper>.data.prepare`` (or ``<paper>.prepare``) with functions decorated by `preparer`; their
signatures are the command line. Tasks that any paper can use are in `core.data.prepare_images`.

.. code-block:: python

    @preparer("vtab_lists")
    def vtab_lists(root: Path, output: Path, tasks: list[str] | None = None) -> str:
        \"\"\"Splits of VTAB-1k as lists of files.

        Args:
            root: the unpacked VTAB folder.
            output: folder of the lists.
            tasks: which of the 19; all when null.
        \"\"\"

Arguments may be str, int, float, bool, Path, lists of these (commas), a ``Literal``, or ``X | None``. What a task
returns is printed. `core.output.progress.Progress` shows how far it is; a task that is stopped should go on where it
was when it is called again.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from core.config.command.cli import parse
from core.config.command.console import wrapped
from core.config.packages import import_part, packages_with
from core.errors import ConfigError, close_names

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__preparation_task__"
_SHARED = "core.data.prepare_images"

# Where a paper says what can be prepared: the second where its `data` is one file.
PLACES = ("data.prepare", "prepare")


def preparer(name: str) -> Callable[[F], F]:
    """Makes a function a preparation task of that name.

    Raises:
        ValueError: the name is no plain word, or an argument has no type hint (the command line needs it).
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"task name '{name}': lower-case letters, digits and underscores")

    def mark(function: F) -> F:
        untyped = [p for p in inspect.signature(function).parameters if p not in function.__annotations__]
        if untyped:
            raise ValueError(f"task '{name}': {', '.join(untyped)} need type hints, which the command line reads")
        setattr(function, _MARK, name)
        return function

    return mark


def tasks_of(module: Any) -> dict[str, Callable[..., Any]]:
    """The tasks in a module by name."""
    found = (value for value in vars(module).values() if callable(value))
    return {getattr(value, _MARK): value for value in found if isinstance(getattr(value, _MARK, None), str)}


def tasks(paper: str | None) -> dict[str, Callable[..., Any]]:
    """A paper's tasks, and those that any paper can use.

    Raises:
        ConfigError: no such paper, or it prepares no data.
    """
    import importlib

    shared = tasks_of(importlib.import_module(_SHARED))
    return shared if paper is None else {**shared, **tasks_of(import_part(paper, *PLACES))}


def run_task(paper: str | None, name: str, words: list[str]) -> Any:
    """Calls a task with arguments from a command line.

    Args:
        paper: package, or None for the tasks that any paper can use.
        name: of the task.
        words: ``key=value``.

    Returns:
        What the task returns.

    Raises:
        ConfigError: unknown task or argument (with near names), missing or malformed value.
    """
    known = tasks(paper)
    if name not in known:
        near = close_names(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(known))}"
        raise ConfigError(f"there is no task '{name}'{f' in {paper}' if paper else ''}; {hint}")
    function = known[name]
    arguments, _ = parse(words, _options(function), doc=inspect.cleandoc(function.__doc__ or name))
    return function(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)})


def _options(function: Callable[..., Any]) -> type:
    """The function's parameters as a dataclass, which the command line fills."""
    hints = typing.get_type_hints(function)
    about = argument_texts(function)
    fields: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        metadata = {"help": about.get(name, "")}
        if parameter.default is parameter.empty:
            fields.append((name, hints[name], dataclasses.field(metadata=metadata)))
        else:
            default = parameter.default
            made = dataclasses.field(default_factory=lambda default=default: default, metadata=metadata)
            fields.append((name, hints[name], made))
    return dataclasses.make_dataclass(function.__name__, fields, kw_only=True)


def argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """Argument -> its text in the docstring's ``Args:`` section."""
    doc = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1], flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def describe(paper: str | None) -> str:
    """A paper's tasks with their first line and arguments."""
    lines = []
    for name, function in sorted(tasks(paper).items()):
        lines.append(_headline(name, function))
        about = argument_texts(function)
        for argument, parameter in inspect.signature(function).parameters.items():
            default = "" if parameter.default is parameter.empty else f" = {parameter.default}"
            hint = parameter.annotation
            kind = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
            text = f"{argument}: {kind}{default}   {about.get(argument, '')}"
            lines.append(wrapped(text, None, "        ", "    "))
    return "\n".join(lines)


@dataclasses.dataclass
class Options:
    """What to prepare; everything else is an argument of the task."""

    task: str = dataclasses.field(default="list", metadata={"help": "what to make; 'list' shows all tasks"})
    paper: str | None = dataclasses.field(default=None, metadata={"help": "package whose data/prepare.py has the task"})


def main(argv: list[str], doc: str) -> None:
    """The command line of ``tools/prepare_data.py``."""
    own, words = _split(argv)
    if not own and any(word in ("--help", "-h") for word in words):
        parse(words, Options, doc=doc)
    options, _ = parse(own, Options, doc=doc, positional="task")
    if options.task == "list":
        papers = packages_with(*PLACES) if options.paper is None else []
        print(describe(options.paper))
        for paper in papers:
            print(f"\npaper={paper}\n{describe_own(paper)}")
        return
    result = run_task(options.paper, options.task, words)
    if result is not None:
        print(result)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What chooses the task (``task=``, ``paper=`` and a bare word), and what is for the task itself."""
    own, words = [], []
    for index, word in enumerate(argv):
        value_of_option = index > 0 and argv[index - 1].startswith("--") and "=" not in argv[index - 1]
        bare = "=" not in word and not word.startswith("-") and not value_of_option
        (own if bare or word.removeprefix("--").startswith(("task=", "paper=")) else words).append(word)
    return own, words


def describe_own(paper: str) -> str:
    """Names and first lines of a paper's own tasks."""
    own = tasks_of(import_part(paper, *PLACES))
    return "\n".join(_headline(name, function) for name, function in sorted(own.items()))


def _headline(name: str, function: Callable[..., Any]) -> str:
    """A task's name and the first line of what it says about itself."""
    return wrapped(f"{name}   {(inspect.getdoc(function) or '').split(chr(10), 1)[0]}", None, "    ", "")
