"""The tiny experiment of `tiny_experiment`, written to a folder of its own."""

from __future__ import annotations

import pytest
from tiny_experiment import EXPERIMENT, PACKAGE


@pytest.fixture(scope="session")
def user(tmp_path_factory):
    """The folder with the package, its configs and everything that runs write."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mypoints.py").write_text(PACKAGE)
    experiments = folder / "configs" / "experiment" / "mine"
    experiments.mkdir(parents=True)
    (experiments / "tiny.yaml").write_text(EXPERIMENT)
    return folder
