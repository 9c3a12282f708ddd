"""Public names of a package, loaded when they are first used: importing the package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, exports: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, to be assigned in its `__init__.py`.

        __getattr__, __dir__, __all__ = lazy(__name__, {"losses": "cross_entropy hinge", "models": "Encoder"})

    An unknown name raises AttributeError.

    Args:
        package: its `__name__`.
        exports: module inside the package -> names that it defines, separated by spaces.
    """
    homes = {name: f"{package}.{module}" for module, names in exports.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # the next use does not come here
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)
