"""Packages with lazy exports: cheap to import, every name there, for Python and for type checkers."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_experiment import ROOT

from core.config.packages import exports

LAZY = sorted(
    ".".join(file.parent.relative_to(ROOT).parts)
    for folder in ROOT.glob("*/__init__.py")
    for file in folder.parent.rglob("__init__.py")
    if "= lazy(" in file.read_text()
)


@pytest.mark.child
def test_importing_the_packages_loads_nothing_heavy():
    heavy = "{'torch', 'torchvision', 'timm', 'mmengine', 'diffusers', 'numpy', 'PIL', 'decord', 'cv2'}"
    script = f"import sys, {', '.join(LAZY)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
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


# --- the eyes of editors and type checkers ---------------------------------------------------------------------------

TYPED = sorted({name.partition(".")[0] for name in LAZY})


def stub(name):
    return ROOT / name.replace(".", "/") / "__init__.pyi"


@pytest.mark.parametrize("name", LAZY)
def test_the_stub_names_what_the_package_gives(name):
    lines = re.findall(r"^from \.([\w.]+) import (\w+) as \2$", stub(name).read_text(), flags=re.M)
    assert sorted(export for _, export in lines) == importlib.import_module(name).__all__
    for module, export in lines:
        home = importlib.import_module(f"{name}.{module}")
        assert getattr(home, export) is getattr(importlib.import_module(name), export)


def test_a_stub_of_another_form_is_refused(tmp_path):
    good = "from .a import b as b"
    for text in ("import os", "from a import b as b", "from .a import b", "from . import b as b", f"{good}\n{good}"):
        (tmp_path / "x.pyi").write_text(text)
        with pytest.raises(ValueError, match=r"x\.pyi, line \d: expected `from \.module import name as name`"):
            exports(tmp_path / "x.pyi")


def test_the_packages_say_that_they_are_typed_and_ship_it():
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {"py.typed", "*.pyi"} <= set(data["*"])
    assert all((ROOT / name / "py.typed").is_file() for name in TYPED)


def decorated(place):
    """Whether a function is decorated, by torch say: the checker does not look into other packages here."""
    package, _, name = place.rpartition(".")
    module = sys.modules[getattr(importlib.import_module(package), name).__module__]
    nodes = ast.parse(Path(module.__file__).read_text()).body
    return any(isinstance(n, ast.FunctionDef) and n.name == name and n.decorator_list for n in nodes)


@pytest.mark.child
def test_a_type_checker_follows_every_name(tmp_path):
    lines, places = [], []
    for number, (package, name) in enumerate((p, n) for p in LAZY for n in exports(stub(p))):
        lines += [f"from {package} import {name} as seen_{number}", f"reveal_type(seen_{number})"]
        places.append(f"{package}.{name}")
    lines += [f"from {package} import Nothing as nothing_{i}" for i, package in enumerate(LAZY)]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    sections = "\n".join(f"[mypy-{name}.*]\nfollow_imports = silent" for name in TYPED)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = skip\nignore_missing_imports = True\n{sections}\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == len(places), done.stdout[-2000:] + done.stderr[-2000:]
    unknown = [place for place, kind in zip(places, revealed, strict=True) if kind == "Any"]
    assert [place for place in unknown if not decorated(place)] == []
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(LAZY) and all('has no attribute "Nothing"' in line for line in errors), errors


@pytest.mark.child
def test_modules_of_core_are_found_by_their_former_names_for_one_version():
    script = """
import importlib, sys, warnings
from core.config import moved
for former, present in moved._MOVED.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(former)
    assert module is importlib.import_module(present) is sys.modules[former], former
    assert module.__name__ == module.__spec__.name == present, former
    said = [str(one.message) for one in caught if issubclass(one.category, DeprecationWarning)]
    assert (f"{former} is now {present}" in said) == (former not in moved._KEPT), (former, said)
    for home, names in moved._GAVE.get(former, {}).items():
        for name in names.split():
            assert getattr(module, name) is getattr(importlib.import_module(home), name), (former, name)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from core.data.files import DataFileError, read_json, replacing
    from core.parts import import_part
    from core.results import Compose, composer, digest, to_stderr
try:
    import core.nothing
except ModuleNotFoundError as error:
    assert error.name == "core.nothing"
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
