"""Packages with lazy exports: cheap to import, every name there."""

import importlib
import subprocess
import sys

import pytest
from tiny_experiment import ROOT

LAZY = sorted(
    ".".join(file.parent.relative_to(ROOT).parts)
    for folder in ROOT.glob("*/__init__.py")
    for file in folder.parent.rglob("__init__.py")
    if "= lazy(" in file.read_text()
)


def test_importing_the_packages_loads_nothing_heavy():
    heavy = "{'torch', 'torchvision', 'timm', 'mmengine', 'diffusers', 'numpy', 'PIL', 'decord', 'cv2'}"
    script = f"import sys, {', '.join(LAZY)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", LAZY)
def test_every_name_is_there(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package)) and "__name__" in dir(package)
    starred = {}
    exec(f"from {name} import *", starred)
    for export in package.__all__:
        value = vars(package)[export]  # kept for the next use
        assert starred[export] is value and getattr(value, "__name__", export) == export
    with pytest.raises(AttributeError, match=rf"'{name}' has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def test_the_engine_and_the_papers_are_among_them():
    assert {"core", "core.data", "stvit", "slot_walks.data"} <= set(LAZY)
