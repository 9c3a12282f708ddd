"""A quick run stays quick: a test that starts a process or compiles without saying so fails there."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree

import pytest
from tiny_experiment import ROOT, environment

from tests import costs, forked

TESTS = """
import multiprocessing, os, subprocess, sys
import pytest, torch

def fork():
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)

def test_program(): subprocess.run([sys.executable, "-c", ""])
def test_fork(): fork()
def test_spawn():
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.kill()
def test_compile(): torch.compile(torch.nn.Identity(), backend="eager")(torch.ones(1))
def test_export(): torch.export.export(torch.nn.Identity(), (torch.ones(1),))
@pytest.fixture
def made(): fork()
def test_fixture(made): pass
def test_nothing(): assert subprocess.run(["uname"], capture_output=True).returncode == 0
@pytest.mark.processes
def test_left_out(): assert False
"""


@pytest.mark.child
def test_what_costs_more_than_its_marks_say_fails_in_a_quick_run(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_costs.py").write_text(TESTS)
    words = [
        "-m",
        "not child and not compile and not slow",
        "-p",
        "no:cacheprovider",
        "--junitxml=out.xml",
        "--rootdir=.",
    ]
    environ = {**environment(), "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = forked.run(["-m", "pytest", "-c", os.devnull, "--rootdir=.", *words], tmp_path, environ)
    cases = ElementTree.parse(tmp_path / "out.xml").iter("testcase")
    said = {case.get("name"): "".join(child.get("message", "") for child in case) for case in cases}
    assert done.returncode == 1 and said.keys() == {
        "test_program", "test_fork", "test_spawn", "test_compile", "test_export", "test_fixture", "test_nothing",
    }  # fmt: skip
    for name, message in said.items():
        mark = {"test_compile": "compile", "test_export": "compile", "test_nothing": ""}.get(name, "child")
        assert f"@pytest.mark.{mark}" in message if mark else not message, name


def test_a_file_stays_on_one_worker_and_pairs_of_processes_are_one_group():
    class Item:
        def __init__(self, nodeid, *marks):
            self.nodeid, self.marks = nodeid, [getattr(pytest.mark, mark).mark for mark in marks]

        def get_closest_marker(self, name):
            return next((mark for mark in self.marks if mark.name == name), None)

        def add_marker(self, mark):
            self.marks.append((getattr(pytest.mark, mark) if isinstance(mark, str) else mark).mark)

    def order(several):
        items = [Item("a.py::1"), Item("b.py::1", "child"), Item("c.py::1", "processes"), Item("b.py::2[x]")]
        items.append(Item("d.py::1", "processes"))
        costs.arrange(items, several)
        return items

    assert all(item.get_closest_marker("child") for item in order(False) if item.get_closest_marker("processes"))
    assert [item.nodeid[0] for item in order(False)] == ["a", "b", "c", "b", "d"]
    groups = [(item.nodeid, item.get_closest_marker("xdist_group").args[0]) for item in order(True)]
    assert groups == [
        ("c.py::1", "processes"), ("d.py::1", "processes"), ("b.py::1", "b.py"), ("b.py::2[x]", "b.py"),
        ("a.py::1", "a.py"),
    ]  # fmt: skip
