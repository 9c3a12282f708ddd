"""`import stvit` makes the models known to timm and OpenMMLab, without importing either.

Where one of them is in use already, the models are registered at once; otherwise as soon as it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Module that has to be complete -> module of ours that registers the models with it.
_REGISTRATIONS = {"timm.models": "stvit.interop.timm", "core.config.registry": "stvit.interop.openmmlab"}
# Our registries are children of mmengine's: who uses mmengine needs them. mmdet reads mmcv's compiled operators, which
# mmcv-lite has not, when it is imported: ours have to be in their place by then.
_IMPLIES = {"mmengine.registry": "core.config.registry", "mmcv": "core.config.mmcv_ops"}


def register_models() -> None:
    """Registers the models with timm and OpenMMLab, now or when they are imported; calling it again changes nothing."""
    for trigger, module in {**_IMPLIES, **_REGISTRATIONS}.items():
        after_import(trigger, lambda module=module: importlib.import_module(module))


def after_import(name: str, action: Callable[[], Any]) -> None:
    """Calls `action` when module `name` has been executed: now if it has, else right after its import."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(MetaPathFinder, Loader):
    """Finds one module as the other finders do, and does something after it has been executed."""

    def __init__(self, name: str, action: Callable[[], Any]) -> None:
        self.name = name
        self.action = action
        self.loader: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module waited for, with this object as its loader; None for all others."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module by its own loader, which is put back, and then acts."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action()
