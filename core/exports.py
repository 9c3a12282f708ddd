"""Public names of a package, loaded when they are first used: importing the package costs nothing."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
