"""The list of `python -m tests.breakages`: lines that are there, tests that are there; the command breaks and asks."""

from __future__ import annotations

import pytest

from tests.breakages import BREAKAGES, ROOT


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda one: one.name)
def test_a_breakage_names_a_line_and_tests_that_are_there(breakage) -> None:
    breakage.broken((ROOT / breakage.file).read_text())  # an error where the line is not there once
    for test in breakage.tests:
        file, _, function = test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert f"\ndef {function.partition('[')[0]}(" in text, test


def test_there_are_forty_of_them() -> None:
    assert len({one.name for one in BREAKAGES}) >= 40
