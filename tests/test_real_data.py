"""Every experiment that needs a user's data has a test that takes two steps on small files in the data's own format.

Which experiments these tests take is read from their parameters, so there is no second list to keep: an experiment that
no test is given is named here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from core.config import compose, experiments, to_dict

TESTS = Path(__file__).parent
PAPERS = sorted({name.split("/")[0] for name in experiments()})
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
# Last words of keys that say where data lies; null asks the user for it.
PLACES = ("root", "path", "file", "folder")


def asks_for_data(name: str) -> bool:
    """Whether an experiment's data sets have a place that the user has to give."""
    cfg = to_dict(compose([f"experiment={name}"]))
    datasets = [cfg[loader]["dataset"] for loader in LOADERS if cfg.get(loader)]
    return any(value is None and key.rpartition("_")[2] in PLACES for data in datasets for key, value in data.items())


def modules(paper: str) -> Iterator[ModuleType]:
    for path in sorted((TESTS / paper).glob(f"test_{paper}_real_*.py")):
        yield importlib.import_module(f"tests.{paper}.{path.stem}")


def parameters(test: Any) -> Iterator[str]:
    """The experiments, without their paper, that a parametrised test is run with."""
    for mark in getattr(test, "pytestmark", ()):
        if mark.name != "parametrize":
            continue
        names, cases = mark.args[:2]
        first = names.split(",")[0] if isinstance(names, str) else names[0]
        if first == "name":
            for case in cases:
                value = getattr(case, "values", case)  # of pytest.param
                yield (value if isinstance(value, str) else value[0]).rpartition("/")[2]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_experiment_on_real_data_takes_two_steps_in_a_test(paper: str) -> None:
    tested = {
        f"{paper}/{name}"
        for module in modules(paper)
        for label, test in vars(module).items()
        if label.startswith("test_") and "two_steps" in label
        for name in parameters(test)
    }
    own = {name for name in experiments() if name.startswith(f"{paper}/")}
    assert tested and tested <= own, "tests of experiments that are gone"
    assert asks_for_data(min(tested)), "keys of places are no longer called so"
    assert not [name for name in sorted(own - tested) if asks_for_data(name)], "no test takes two steps with these"
