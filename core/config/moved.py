"""Modules of core by their former names, for one version: importing one warns and gives the module itself.

Two stay under both names: `core.mmcv_ops`, which configs of users import, and `core.registry`, which mmengine does.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Folder: modules in it, each former=present where the names differ.
_ROOMS = {
    "config": (
        "registry kinds config_key=key exports=packages parts=packages files "
        "influence fingerprint mmcv_ops installed shortened"
    ),
    "config.command": "cli console messages signals processes",
    "checkpoint": "weights placement run_folder latest locks selection plain_state=plain",
    "checkpoint.official": (
        "checkpoint.archive=archive checkpoint.builders=builders checkpoint.formats=formats "
        "checkpoint.limits=limits checkpoint.unpickler=unpickler checkpoint.reading=reading"
    ),
    "metrics": "metrics.reading=predictions evaluators",
    "output": "render render_text=text media progress visualization=backends",
    "data": "prepare prepare_images",
    "data.loading": (
        "data.loader=loader data.prefetch=prefetch data.sampling=sampling data.batching=batching "
        "data.seeded=seeded data.seeds=seeds data.batch=batch data.tree=tree position"
    ),
    "data.sources": (
        "data.folder=folder data.tar=tar data.image_zip=image_zip data.imagenet=imagenet "
        "data.video=video data.video_list=video_list data.images=images data.packed=packed "
        "data.files=files data.digits=digits data.annotations=annotations"
    ),
    "optim": "param_groups=groups schedules ema sharding=dtensor parallel=fsdp regime buffers",
    "engine": "hooks launch runner runner_building runner_placement detection switches",
    "engine.commands": "evaluation inference convert tracing lr_finder lr_curve",
    "engine.keys": "config_check=check config_kinds=kinds objective eval_sets hook_configs=hooks",
    "engine.loops": "loop=train eval_loop=evaluation eval_sets_loop=eval_sets sanity",
    "engine.run": "run_start=start resume stages rerun run_config=config run_options=options sweep",
    "engine.state": "runner_state=runner hook_state=hooks randomness initial_weights",
    "engine.hooks": (
        "hooks.checkpoint=checkpoint hooks.early_stopping=early_stopping hooks.ema=ema "
        "hooks.finite=finite hooks.logging=logging hooks.lr_sweep=lr_sweep hooks.media=media"
    ),
    "profile": "benchmarking figures profile_experiment=experiment",
    "tables": "claim_file claim_report claim_store claims table_file ablation results=runs comparison=paired",
}
_MOVED = {
    f"core.{former}": f"core.{room}.{present or former}"
    for room, modules in _ROOMS.items()
    for former, _, present in (module.partition("=") for module in modules.split())
}
# Names that a module gave and that another one defines now: former module, then that other one and the names.
_GAVE = {
    "core.data.files": {
        "core.config.files": "check_records read_json read_lines read_text read_yaml reading replacing",
        "core.errors": "DataFileError MissingDataError",
    },
    "core.results": {
        "core.config.fingerprint": "digest fingerprint fingerprints first_difference relevant",
        "core.config.composition": "Compose composer",
        "core.config.command.messages": "to_stderr",
    },
}
# mmengine imports `SCOPE.registry` of a type that is written with a scope, `core.EMAHook`.
_KEPT = {"core.mmcv_ops", "core.registry"}


class _Finder(MetaPathFinder, Loader):
    """Asked first: `core.hooks` has the path of a folder, where its modules would be found and executed again."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        present = _MOVED[spec.name]
        if spec.name not in _KEPT:
            warnings.warn(f"{spec.name} is now {present}", DeprecationWarning, stacklevel=2)
        self._own = importlib.import_module(present).__spec__
        module = sys.modules[present]
        for home, names in _GAVE.get(spec.name, {}).items():
            for name in names.split():
                vars(module).setdefault(name, getattr(importlib.import_module(home), name))
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # the import system has just set that of the former name


def install() -> None:
    """Lets the former names be imported; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
