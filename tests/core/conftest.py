"""The tiny experiment of `tiny_experiment`, written to a folder of its own."""

from __future__ import annotations

import pytest
from tiny_experiment import EXPERIMENT, PACKAGE


# A worker may come back to a module for the tests of another group: its fixtures then begin in a folder of their own.
@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """The folder with the package, its configs and everything that runs write."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mypoints.py").write_text(PACKAGE)
    experiments = folder / "configs" / "experiment" / "mine"
    experiments.mkdir(parents=True)
    (experiments / "tiny.yaml").write_text(EXPERIMENT)
    return folder


@pytest.fixture
def tiny_config(user, tmp_path, monkeypatch):
    """Composes the tiny experiment with overrides, in a folder of the test's own."""
    from core.config import compose

    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: compose(["experiment=mine/tiny", "runtime=cpu", *overrides], config_dir=user / "configs")


@pytest.fixture
def tiny(tiny_config):
    """Runs the tiny experiment with overrides, in a folder of the test's own; returns its result."""
    from core.engine.launch import run

    return lambda *overrides: run(tiny_config(*overrides))
