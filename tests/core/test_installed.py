"""Two distributions are called mmengine: the engine says so where the unmaintained one is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_experiment import ROOT, environment

from core.config.installed import TwoMMEngines, check_mmengine


def install(folder, name, version):
    """A distribution's metadata, as pip leaves them."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_both_are_noticed_with_the_remedy(tmp_path, monkeypatch):
    install(tmp_path, "mmengine", "0.10.7")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(TwoMMEngines, match=r"mmengine 0\.10\.7 .* are onedl-mmengine's.*pip uninstall -y mmengine"):
        check_mmengine()
    package = tmp_path / "mmengine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "version.py").write_text("__version__ = '0.10.7'\n")
    found = {name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] == "mmengine"}
    for name in found:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(TwoMMEngines, match=r"are the unmaintained one's"):
        check_mmengine()


def test_the_unmaintained_one_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("core.config.installed._version", {"mmengine": "0.10.7"}.get)
    with pytest.raises(ImportError, match=r"not maintained.*onedl-mmengine: pip uninstall"):
        check_mmengine()


@pytest.mark.filterwarnings("error")
def test_ours_alone_is_silent():
    check_mmengine()


@pytest.mark.child
def test_it_is_noticed_once_and_when_the_engine_is_imported(tmp_path):
    install(tmp_path, "mmengine", "0.10.7")
    environ = {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONWARNINGS": "default"}
    code = "import core.config.registry, core.engine.runner"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("TwoMMEngines") == 1 and "pip uninstall" in done.stderr
