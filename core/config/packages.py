"""The packages beside this one: their public names, loaded when first used, and their parts, found by name.

A part is a module that every paper may have: ``<paper>.checkpoint``, ``<paper>.prepare``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import ConfigError, close_names


def lazy(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, to be assigned in its `__init__.py`.

        __getattr__, __dir__, __all__ = lazy(__name__, __file__)

    The names stand in the stub `__init__.pyi` beside it, one import each, where editors and type checkers find them:

        from .losses import cross_entropy as cross_entropy
        from .models import Encoder as Encoder

    An unknown name raises AttributeError.

    Args:
        package: its `__name__`.
        file: its `__file__`.

    Raises:
        ValueError: the stub holds something else than such imports.
    """
    homes = {name: f"{package}.{module}" for name, module in exports(Path(file).with_suffix(".pyi")).items()}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # the next use does not come here
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)


def exports(stub: Path) -> dict[str, str]:
    """Name -> module inside the package, from a stub.

    Raises:
        ValueError: it holds something else than imports of the form ``from .module import name as name``.
    """
    found: dict[str, str] = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        names = node.names if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module else []
        if not names or any(alias.asname != alias.name or alias.name in found for alias in names):
            raise ValueError(f"{stub}, line {node.lineno}: expected `from .module import name as name`, each name once")
        found |= {alias.name: node.module for alias in names}
    return found


def import_part(paper: str, *parts: str) -> Any:
    """The module ``<paper>.<part>``, imported on demand; of several parts the first one that is there.

    Raises:
        ConfigError: no such package or no such module in it; those that have one are named.
        ImportError: the module exists but cannot be imported.
    """
    if os.getcwd() not in sys.path:  # a user's own package beside the command
        sys.path.insert(0, os.getcwd())
    if paper.isidentifier() and importlib.util.find_spec(paper) is not None:
        for part in parts:
            if _is_there(f"{paper}.{part}"):
                return importlib.import_module(f"{paper}.{part}")
        problem = f"the package '{paper}' has no {parts[0].replace('.', '/')}.py"
    else:
        problem = f"there is no package '{paper}'"
    having = packages_with(*parts)
    near = close_names(paper, having)
    hint = (
        f"; did you mean {' or '.join(near)}?" if near else f" (packages that have one: {', '.join(having) or 'none'})"
    )
    raise ConfigError(problem + hint)


def _is_there(module: str) -> bool:
    folder = module.rpartition(".")[0]
    if folder.count(".") and not (_is_there(folder) and importlib.util.find_spec(folder).submodule_search_locations):
        return False  # a file where others have a folder
    return importlib.util.find_spec(module) is not None


def packages_with(*parts: str) -> list[str]:
    """Packages beside this one and in the working directory that have a module of one of these names, sorted."""
    found = set()
    for folder in {str(Path(__file__).resolve().parents[2]), os.getcwd()}:
        for module in pkgutil.iter_modules([folder]):
            places = [Path(folder, module.name, *part.split(".")) for part in parts]
            there = any(place.with_suffix(".py").exists() or (place / "__init__.py").exists() for place in places)
            if module.name != "core" and there:
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
