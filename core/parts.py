"""A paper's parts, found by name: ``<paper>.checkpoint``, ``<paper>.prepare``; and the options that go to them."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

from core.errors import ConfigError


def import_part(paper: str, part: str) -> Any:
    """The module ``<paper>.<part>``, imported on demand.

    Raises:
        ConfigError: no such package or no such module in it; those that have one are named.
        ImportError: the module exists but cannot be imported.
    """
    if os.getcwd() not in sys.path:  # a user's own package beside the command
        sys.path.insert(0, os.getcwd())
    if paper.isidentifier() and importlib.util.find_spec(paper) is not None:
        if importlib.util.find_spec(f"{paper}.{part}") is not None:
            return importlib.import_module(f"{paper}.{part}")
        problem = f"the package '{paper}' has no {part}.py"
    else:
        problem = f"there is no package '{paper}'"
    having = packages_with(part)
    near = difflib.get_close_matches(paper, having, n=2, cutoff=0.5)
    hint = (
        f"; did you mean {' or '.join(near)}?" if near else f" (packages that have one: {', '.join(having) or 'none'})"
    )
    raise ConfigError(problem + hint)


def packages_with(part: str) -> list[str]:
    """Packages beside this one and in the working directory that have a module of that name, sorted."""
    found = set()
    for folder in {str(Path(__file__).resolve().parents[1]), os.getcwd()}:
        for module in pkgutil.iter_modules([folder]):
            place = Path(folder, module.name)
            if module.name != "core" and ((place / f"{part}.py").exists() or (place / part / "__init__.py").exists()):
                found.add(module.name)
    return sorted(found)


def split_words(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Command-line words as options (plain keys, YAML values) and Hydra overrides (``a.b=c``, ``+a=b``, ``~a``)."""
    import yaml

    extra, overrides = {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            overrides.append(word)
            continue
        extra[key] = value
        with contextlib.suppress(yaml.YAMLError):
            extra[key] = yaml.safe_load(value)
    return extra, overrides
